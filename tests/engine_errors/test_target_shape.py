# SPDX-License-Identifier: Apache-2.0
"""Trees, chains or a refusal: what the support table says of every family is what the code says."""

from types import SimpleNamespace

import pytest
from engine_cases.support_table import CHAIN, REFUSED, TARGETS, TREE
from tiny_models import write_json

from vllm_redrafter.engine import target_shape
from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.target_shape import (
    Shape,
    TargetShape,
    check_states,
    put_shape,
    shape_of,
    shape_of_model,
)

# vLLM inspects every architecture once in a process of its own: about 10 s, kept afterwards.
ALWAYS = ("llama", "deepseek_v3", "mamba")


def model_of(directory, family):
    """vLLM's ModelConfig of a family with its own defaults, but for what the table names."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.config import ModelConfig

    two_layers = {"num_hidden_layers": 2} if TARGETS[family].fields else {}
    config = AutoConfig.for_model(family, **TARGETS[family].fields, **two_layers)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    if family == "bart":
        name = "BartForConditionalGeneration"
    write_json(directory / "config.json", {**config.to_dict(), "architectures": [name]})
    return ModelConfig(model=str(directory), skip_tokenizer_init=True)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in TARGETS
    ],
)
def test_table(tmp_path, family):
    model = model_of(tmp_path, family)
    found = [shape_of_model(model, cpu).shape.value for cpu in (True, False)]
    assert found == [TARGETS[family].cpu, TARGETS[family].cuda]


def test_the_table_has_all_three():
    shapes = {shape for row in TARGETS.values() for shape in (row.cpu, row.cuda)}
    assert shapes == {TREE, CHAIN, REFUSED} == {shape.value for shape in Shape}


def test_control_a_kind_that_changes_sides(tmp_path, monkeypatch):
    monkeypatch.setitem(target_shape.KEEP_STATES, True, (target_shape.Recurrence.MAMBA1,))
    model = model_of(tmp_path, "mamba")
    assert shape_of_model(model, cpu=True).shape.value != TARGETS["mamba"].cpu


def test_a_refusal_names_vllms_reason(tmp_path):
    shape = shape_of_model(model_of(tmp_path, "mamba"), cpu=True)
    assert shape.why == (
        "ReDrafter does not support Mamba 1 layers (MambaForCausalLM) on CPUs, because vLLM cannot "
        "verify drafts of them: its kernels there take no number of accepted tokens, and go on "
        "from the state behind a rejected one; use a decoder-only target with full or "
        "sliding-window attention in every layer."
    )


def test_workers_know_the_shape():
    config = SimpleNamespace(additional_config={})
    assert shape_of(config) == TargetShape(Shape.TREE)
    shape = TargetShape(Shape.CHAIN, "for a reason", keeps_states=True)
    put_shape(config, shape)
    assert shape_of(config) == shape


@pytest.mark.parametrize("cpu, kind, fits", [
    (True, "GDN_ATTN", False), (False, "GDN_ATTN", True), (False, "MAMBA2", True),
    (False, "SHORT_CONV", True), (False, "MAMBA1", False), (False, "LINEAR", False),
])  # fmt: skip
def test_layers_that_are_there(cpu, kind, fits):
    spec = SimpleNamespace(mamba_type=SimpleNamespace(name=kind))
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace()), SimpleNamespace(kv_cache_spec=spec)]
    if fits:
        check_states(groups, cpu)
        return
    with pytest.raises(UnsupportedError, match=f"vLLM's kind {kind}, whose state cannot go back"):
        check_states(groups, cpu)
