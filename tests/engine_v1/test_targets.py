# SPDX-License-Identifier: Apache-2.0
"""Quantized heads, added tokens, scaled embeddings and logits on Model Runner V1."""

import pytest
import torch
from engine_cases import targets
from engine_cases.targets import ADDED, SCALED, W4A16, W8A8
from safetensors.torch import load_file
from vllm import SamplingParams

from engine_v1.conftest import SPEC
from engine_v1.engines import Pair, engine, tokens
from engine_v1.tiny_target import VOCAB, prompts
from vllm_redrafter.engine import target_tables as tables
from vllm_redrafter.engine.quantized_tables import head_rows


def pair_of(model, drafter, **settings):
    return Pair(engine(model, **settings), engine(model, drafter, **settings, **SPEC))


def stored_head(source, bits, group):
    weight = load_file(source / "model.safetensors")["lm_head.weight"]
    values, scale = targets.quantize(weight, bits, group)
    parts = values.view(*scale.shape, -1).float() * scale[..., None]
    return parts.view_as(weight)


def head_of(pair, *, head=True):
    return tables.target_tables(pair.trees.runner.model, head=head)[1]


def test_quantized_head(target, tmp_path):
    """A drafter that shares it gets the very numbers; one with a head of its own asks nothing."""
    model = targets.write_quantized(tmp_path / "target", target, W8A8)
    pair = pair_of(model, targets.write_drafter(tmp_path / "drafter", shared_head=True))
    targets.check(pair)
    head, stored = head_of(pair), stored_head(target, 8, None)
    assert head.shape == (VOCAB, stored.shape[1])
    torch.testing.assert_close(head[:VOCAB], stored)
    some = torch.tensor([256, 0, 77])
    torch.testing.assert_close(head[some], stored[some])
    assert head_of(pair, head=False) is None


def test_a_fixed_input_scale_loses_nothing(target, tmp_path):
    """Of a head that quantizes what it is given by one scale, as it was calibrated."""
    stored, scale = stored_head(target, 8, None), torch.tensor(0.05)

    class Calibrated(torch.nn.Module):
        embedding_dim, params_dtype, input_scale = stored.shape[1], torch.float32, scale
        quant_method = property(lambda self: self)

        def apply(self, _, x, bias):
            return (x / self.input_scale).round().clamp(-128, 127) * self.input_scale @ stored.T

    torch.testing.assert_close(head_rows(Calibrated(), torch.arange(VOCAB)), stored)
    Calibrated.input_scale = None
    module = Calibrated()
    module.apply = lambda _, x, bias: (x / scale).round().clamp(-4, 4) * scale @ stored.T
    # The control: a unit vector that is too long for the scale.
    assert not torch.allclose(head_rows(module, torch.arange(VOCAB)), stored)


def test_quantized_head_of_four_bits(target, tmp_path):
    """vLLM's CPU kernel for it takes no float32: equality is not claimed (see test_bfloat16)."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's build for CPUs without AVX-512 has no W4A16 kernel for any engine")
    model = targets.write_quantized(tmp_path / "target", target, W4A16, dtype="bfloat16")
    drafter = targets.write_drafter(tmp_path / "drafter", shared_head=True)
    pair = pair_of(model, drafter, dtype="bfloat16")
    run = pair.run(prompts(16), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    run.assert_saw_trees()
    said, expected = tokens(run.got), tokens(run.expected)
    assert [row[0] for row in said] == [row[0] for row in expected]
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 6
    # Scales are stored in bfloat16.
    stored = stored_head(target, 4, targets.GROUP)
    torch.testing.assert_close(head_of(pair)[:VOCAB].float(), stored, atol=0.02, rtol=0.02)


def test_tokens_beyond_the_drafters_vocabulary(tmp_path):
    model = targets.write_with_added_tokens(tmp_path / "target")
    said = targets.check(pair_of(model, targets.write_drafter(tmp_path / "drafter")))
    assert any(VOCAB <= token < VOCAB + ADDED for row in said for token in row)


@pytest.mark.parametrize("family", SCALED)
def test_scaled_embeddings_and_logits(tmp_path, family):
    model = targets.write_scaled(tmp_path / "target", family)
    targets.check(pair_of(model, targets.write_drafter(tmp_path / "drafter", shared_head=True)))
