# SPDX-License-Identifier: Apache-2.0
"""The emulation that the CUDA kernels' tests stand on computes what a GPU would, and sees bugs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulation.build import load_source

BLOCK_SUM, BLOCK_SUM_WITHOUT_BARRIERS, WARP_SUM, MULTIPLY, MULTIPLY_TOO_SOON, DIVERGE = range(6)


@pytest.fixture(scope="module")
def run():
    load_source(Path(__file__).parent / "emulation/toys.cu", seed=1)
    return torch.ops.redrafter_toys.run


def test_blocks_barriers_and_shared_memory(run):
    x = torch.randint(-8, 8, (5, 128)).float()
    out = torch.full((5,), torch.nan)
    run(out, x, x, BLOCK_SUM)
    assert torch.equal(out, x.sum(1))


def test_missing_barriers_are_noticed(run):
    x = torch.randint(1, 8, (5, 128)).float()
    out = torch.full((5,), torch.nan)
    run(out, x, x, BLOCK_SUM_WITHOUT_BARRIERS)
    assert not torch.equal(out, x.sum(1))


def test_shuffles(run):
    x = torch.randint(-8, 8, (32,)).float()
    out = torch.full((32,), torch.nan)
    run(out, x, x, WARP_SUM)
    assert torch.equal(out, x.sum().expand(32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_core_fragments(run, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out = torch.full((16, 8), torch.nan)
    run(out, a, b, MULTIPLY)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_copies_arrive_no_sooner_than_they_are_waited_for(run):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    out = torch.zeros(16, 8)
    run(out, a, b, MULTIPLY_TOO_SOON)
    assert out.isnan().all()


def test_divergence_stops_with_a_message(run):
    with pytest.raises(RuntimeError, match="diverge.* wait for each other at different places"):
        run(torch.zeros(32), torch.zeros(1), torch.zeros(1), DIVERGE)


def test_order_of_threads_follows_the_seed(run):
    x = torch.rand(5, 128)
    results = []
    for seed in (1, 1, 2):
        load_source(Path(__file__).parent / "emulation/toys.cu", seed=seed)
        out = torch.empty(5)
        run(out, x, x, BLOCK_SUM_WITHOUT_BARRIERS)
        results.append(out)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
