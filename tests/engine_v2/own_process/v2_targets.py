# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_targets.py`` on Model Runner V2, and quantized embeddings.

vLLM reads those with a Triton kernel, which Model Runner V1 has not got on a CPU.
"""

import pytest
import torch
from engine_cases import targets
from engine_cases.targets import SCALED, W8A8
from safetensors.torch import load_file

from engine_v2.own_process.engines import SPEC, Pair, engine


def pair_of(model, drafter):
    return Pair(engine(model), engine(model, drafter, **SPEC))


def test_quantized_head_and_embedding(target, tmp_path):
    model = targets.write_quantized(tmp_path / "target", target, W8A8, embedding=True)
    pair = pair_of(model, targets.write_drafter(tmp_path / "drafter", shared_head=True))
    targets.check(pair, count=3, length=8)
    weight = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    values, scale = targets.quantize(weight, 4, targets.GROUP)
    stored = (values.view(*scale.shape, -1).float() * scale[..., None]).view_as(weight)
    torch.testing.assert_close(pair.trees.speculator.model.embedding, stored)


@pytest.mark.slow
def test_tokens_beyond_the_drafters_vocabulary(tmp_path):
    model = targets.write_with_added_tokens(tmp_path / "target")
    targets.check(pair_of(model, targets.write_drafter(tmp_path / "drafter")), count=3, length=8)


@pytest.mark.slow
@pytest.mark.parametrize("family", SCALED)
def test_scaled_embeddings_and_logits(tmp_path, family):
    model = targets.write_scaled(tmp_path / "target", family)
    drafter = targets.write_drafter(tmp_path / "drafter", shared_head=True)
    targets.check(pair_of(model, drafter), count=3, length=8)
