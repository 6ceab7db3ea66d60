# SPDX-License-Identifier: Apache-2.0
"""A drafter that was made for another target: a warning, or a refusal where that is asked for."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from engine_v1.tiny_target import prompts, tiny_drafter, write_target
from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.drafter.fingerprint import FIELD
from vllm_redrafter.engine import acceptance_watch
from vllm_redrafter.engine.v1.proposer import ReDrafterProposer
from vllm_redrafter.engine.v2.speculator import ReDrafterSpeculator
from vllm_redrafter.training.fingerprint import of_directory

WRONG = "was not made for this target, but for one whose"


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("WARNING", logger="vllm")
    return lambda text: {r.message for r in caplog.records if text in r.message}


@pytest.fixture(scope="module")
def known(target, tmp_path_factory):
    """The same drafter with fingerprints: of its target, and of others of the same sizes."""
    folder = tmp_path_factory.mktemp("known")
    others = {"right": target}
    others["other"] = write_target(folder / "other-target", seed=4)
    others["tied"] = write_target(folder / "tied-target", tied=True)  # another head alone
    for name, directory in others.items():
        fields = {FIELD: of_directory(directory).to_json()}
        save_drafter(tiny_drafter(), folder / name, **fields)
    save_drafter(tiny_drafter(), folder / "unknown")
    return folder


def on_v1(runner, options):
    proposer = ReDrafterProposer(runner.vllm_config)
    proposer.options = options
    proposer.load_model(runner.model)


def on_v2(runner, options):
    made = SimpleNamespace(options=options, device="cpu")
    ReDrafterSpeculator.load_draft_model(made, runner.model, set())


@pytest.fixture(params=[on_v1, on_v2], ids=["v1", "v2"])
def load(request, pair, known):
    """Load a drafter as an engine does."""
    runner = pair.trees.runner

    def load(name, **changes):
        options = replace(runner._options, model=str(known / name), **changes)
        request.param(runner, options)

    return load


@pytest.mark.parametrize("name", ["right", "unknown"])
@pytest.mark.parametrize("strict", [False, True])
def test_its_own_target(load, warnings, name, strict):
    load(name, fail_on_target_mismatch=strict)
    assert not warnings("was not made")


@pytest.mark.parametrize("name, table", [("other", "input embedding"), ("tied", "output head")])
def test_another_target(load, warnings, known, name, table):
    load(name)
    (text,) = warnings(WRONG)
    assert text.startswith(f"The drafter in '{known / name}' {WRONG} {table} is another")
    assert "use a drafter that was trained for this target" in text
    with pytest.raises(DrafterError, match=f"{WRONG} {table}.*leave out fail_on_target_mismatch."):
        load(name, fail_on_target_mismatch=True)


def test_a_target_in_bfloat16(pair, load, warnings, monkeypatch):
    """The fingerprint is of float32."""
    model = pair.trees.runner.model
    for module in (model.lm_head, model.model.embed_tokens):
        monkeypatch.setattr(module.weight, "data", module.weight.data.bfloat16())
    load("right", fail_on_target_mismatch=True)
    with pytest.raises(DrafterError, match=WRONG):
        load("other", fail_on_target_mismatch=True)


def test_layers_and_tokenizer_before_anything_is_loaded(target, known, warnings, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    def configure(strict=False, **changed):
        directory = tmp_path / "drafter"
        fingerprint = of_directory(target).to_json() | changed
        save_drafter(tiny_drafter(), directory, **{FIELD: fingerprint})
        config = {"method": "redrafter", "model": str(directory)}
        if strict:
            config["fail_on_target_mismatch"] = True
        EngineArgs(model=str(target), speculative_config=config).create_engine_config()

    configure(strict=True)
    configure(strict=True, num_hidden_layers=None, tokenizer_sha256=None)
    assert not warnings("was not made")
    for changed, what in (
        ({"num_hidden_layers": 7}, "but for one of 7 layers, and this has 2"),
        ({"tokenizer_sha256": "0" * 64}, "but for one with another tokenizer"),
    ):
        configure(**changed)
        assert warnings(what)
        with pytest.raises(DrafterError, match=what):
            configure(strict=True, **changed)


def test_the_line_about_acceptance(pair, warnings):
    """A random drafter is hardly ever right; an oracle is. The engine is the same."""
    batch = prompts(8)
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    pair.run(batch, params).assert_equal()
    right = pair.trees.runner.redrafter_stats.watch
    assert right._accepted > right._drafts > 100 and not warnings("acceptance length")
    pair.trees.reset()
    pair.trees.generate(prompts(24), params)
    stats = pair.trees.stats
    assert stats["drafts"] > acceptance_watch.WINDOW
    # The lookup's merit, which is not counted.
    assert stats["accepted_by_source"]["lookup"] > 5 * stats["accepted_by_source"]["drafter"]
    assert len(warnings("stays near 1.0")) == 1


def test_json_of_the_fingerprint_is_short(known):
    text = json.dumps(json.loads((known / "right" / "config.json").read_text())[FIELD])
    assert len(text) < 2_000
