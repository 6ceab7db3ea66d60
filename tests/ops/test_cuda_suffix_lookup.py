# SPDX-License-Identifier: Apache-2.0
"""suffix_lookup on CUDA, or its kernel emulated: the twin's integers, its scores to 1e-6."""

from __future__ import annotations

import pytest
import torch
from lookup_cases import Batch, assert_same, one_text, outputs, random_batch

from vllm_redrafter.drafter.beam_search import FILLER_SCORE
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.lookup.suffix import suffix_lookup as twin

TILE = 4096  # the kernel's


def run(device_ops, case: Batch, chains=4, depth=16, window=32, longest=32) -> Chains:
    """Into poisoned outputs."""
    ops, device = device_ops
    out = outputs(case.slots.shape[0], chains, depth)
    out = Chains(**{name: tensor.to(device) for name, tensor in vars(out).items()})
    case = case.to(device)
    ops.suffix_lookup(out.tokens, out.matched, out.scores, *case, window, longest)
    return Chains(**{name: tensor.cpu() for name, tensor in vars(out).items()})


def assert_identical(device_ops, case: Batch, **sizes: int) -> Chains:
    found = run(device_ops, case, **sizes)
    assert_same(found, twin(*case, **sizes), rtol=1e-6)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_texts(device_ops, seed):
    torch.manual_seed(seed)
    columns, vocab = (1, 2, 40, 300)[seed % 4], (1, 2, 3, 12, 60)[seed % 5]
    case = random_batch(3, 2, columns, vocab, seed=seed)
    chains, depth, window, longest = (int(torch.randint(1, n, ())) for n in (10, 21, 65, 41))
    assert_identical(device_ops, case, chains=chains, depth=depth, window=window, longest=longest)


@pytest.mark.parametrize("chains, depth", [(70, 33), (64, 70), (33, 1), (32, 32), (1, 64)])
def test_many_chains_and_deep_ones(device_ops, chains, depth):
    """More chains than lanes, more depths than lanes."""
    case = random_batch(2, 2, 400, 3, seed=chains)
    case = case._replace(starts=case.starts * 0, ends=case.ends * 0 + 400)
    found = assert_identical(device_ops, case, chains=chains, depth=depth, window=64, longest=100)
    assert (found.matched[:, : min(chains, 64)] > 0).all()


def test_long_matches(device_ops):
    """Longer than a warp compares at once, ending at every place in it, or at the start."""
    for period in (1, 30, 64, 97, 130):
        text = (list(range(period)) * 5)[:200]
        for longest in (31, 32, 33, 34, 65, 1000):
            assert_identical(device_ops, one_text(text), longest=longest)


@pytest.mark.parametrize("length", [TILE, TILE + 1, TILE + 2, 2 * TILE + 1, 9000])
def test_tiles(device_ops, length):
    """Occurrences on both sides of the tiles' borders, and more of them than the window takes."""
    text = torch.arange(length, dtype=torch.int32)[None] + 10
    last = length - 1
    places = [last - i for i in (1, 2, 511, 512, 513, TILE, TILE + 1, 2 * TILE, last)]
    text[0, [place for place in places if place >= 0]] = text[0, last].clone()
    number = torch.zeros(1, dtype=torch.int32)
    case = Batch(text, number, number, number + length)
    for window in (1, 3, 6, 7, 64):
        found = assert_identical(device_ops, case, chains=9, depth=3, window=window)
    assert int((found.matched > 0).sum()) == len({place for place in places if place >= 0})


def test_dense_occurrences_fill_the_window_in_order(device_ops):
    case = random_batch(4, 4, 2000, 2, seed=7)
    for window in (1, 31, 33, 64):
        assert_identical(device_ops, case, chains=64, depth=2, window=window, longest=6)


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_batches(device_ops, batch):
    assert_identical(device_ops, random_batch(batch, 5, 50, 4, seed=batch), depth=3)


def test_strides_and_tokens_outside_the_text(device_ops):
    case = random_batch(4, 3, 50, 4, seed=8)
    wanted = twin(*case)
    turned = torch.stack([case.text + 1, case.text], -1).permute(1, 2, 0).contiguous()
    turned = turned.permute(2, 1, 0)[:, 1]
    assert torch.equal(turned, case.text) and turned.stride() == (1, 6)
    ops, device = device_ops
    out = outputs(4, 4, 16)
    out = Chains(**{name: tensor.to(device) for name, tensor in vars(out).items()})
    view = torch.empty(300, dtype=torch.int32, device=device).as_strided((3, 50), (1, 6))
    view.copy_(turned)
    inputs = case.to(device)[1:]
    ops.suffix_lookup(out.tokens, out.matched, out.scores, view, *inputs, 32, 32)
    assert_same(out, wanted, rtol=1e-6)
    text = [5, 1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2]
    wanted = twin(*one_text(text))
    assert_same(run(device_ops, one_text(text, behind=(3, 8, 7, 1, 2))), wanted, rtol=1e-6)


def test_what_the_cpu_refuses_finds_nothing(device_ops):
    """And the requests beside it are as ever."""
    case = random_batch(7, 3, 40, 3, seed=9)
    slots, starts, ends = (tensor.clone() for tensor in case[1:])
    slots[:2] = torch.tensor([-1, 3])
    starts[2], starts[3], ends[3], ends[4] = -1, 30, 29, 41
    found = run(device_ops, Batch(case.text, slots, starts, ends))
    assert not found.tokens[:5].any() and not found.matched[:5].any()
    assert (found.scores[:5] == FILLER_SCORE).all()
    good = Batch(case.text, *(tensor[5:] for tensor in (slots, starts, ends)))
    rest = Chains(**{name: tensor[5:] for name, tensor in vars(found).items()})
    assert_same(rest, twin(*good), rtol=1e-6)


def test_a_window_beyond_the_kernels_is_refused(device_ops):
    with pytest.raises(RuntimeError, match="window is 65; on CUDA it may be at most 64"):
        run(device_ops, one_text([1, 2, 1]), window=65)
