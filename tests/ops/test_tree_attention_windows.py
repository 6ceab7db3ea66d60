# SPDX-License-Identifier: Apache-2.0
"""Sliding windows and attention sinks of tree_attention, on the CPU."""

from __future__ import annotations

import random

import pytest
import torch
from paged_cases import LAYOUTS, AttentionCase, attention_case, random_sizes
from test_tree_attention import DTYPES, check, excess, run

from vllm_redrafter.ops import reference
from vllm_redrafter.ops import tree_attention as module


def by_position(case: AttentionCase) -> torch.Tensor:
    """The float64 result by the definition with positions, row by row, without the twin's code.

    A row's position is its context plus its depth, which is one less than what its mask counts.
    """
    out = torch.zeros(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.key_cache.shape[1]
    for r, start in enumerate(case.row_start.tolist()):
        context = int(case.context_lens[r])
        for i in range(int(case.row_count[r])):
            sees = reference.unpack_bits(case.masks[start + i : start + i + 1], i + 1)[0]
            own = context + int(sees.sum()) - 1
            rows = sees.nonzero().flatten().tolist()
            # (where it is, at which position) of everything that is not hidden.
            places = [(at, at) for at in range(context)]
            places += [(context + row, context + depth) for depth, row in enumerate(rows)]
            used = [at for at, position in places if position > own - case.window]
            blocks = case.block_table[int(case.request_index[r])]
            key, value = (
                torch.cat([
                    reference.gather_tokens(cache, cache_map, blocks, at + 1, at) for at in used
                ]).double().repeat_interleave(group, 1)
                for cache, cache_map in (
                    (case.key_cache, case.key_map), (case.value_cache, case.value_map),
                )
            )  # fmt: skip
            scores = torch.einsum("hd,jhd->hj", case.query[start + i].double(), key) * case.scale
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            weights = scores.exp()
            total = weights.sum(-1, keepdim=True)
            if case.sinks is not None:
                total = total + case.sinks.double().exp()[:, None]
            out[start + i] = torch.einsum("hj,jhd->hd", weights / total, value)
    return out


@pytest.mark.parametrize("window", [1, 2, 5, 33, 64, 1000])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_twin_is_the_definition(window, sinks):
    torch.manual_seed(window)
    case = attention_case(
        torch.float32, [70, 0, 3], [9, 12, 4], kv_heads=2, group=2, block_size=16,
        softcap=7.0 if sinks else 0.0, window=window, sinks=sinks,
    )  # fmt: skip
    exact, _ = case.exact()
    torch.testing.assert_close(exact[case.covered()], by_position(case)[case.covered()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows(dtype, layout, each_isa):
    """Block sizes, and windows that end before, at and after edges of blocks and tiles."""
    torch.manual_seed(1)
    for window in (1, 3, 16, 17, 63, 64, 65, 200):
        for head_dim, group, block_size in [(64, 3, 32), (80, 1, 16), (64, 2, 128)]:
            check(
                attention_case(
                    dtype, [77, 0, 130, 64, 300], [6, 3, 17, 1, 8], head_dim=head_dim, kv_heads=2,
                    group=group, block_size=block_size, layout=layout, window=window,
                )
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_shorter_than_a_tree_is_deep(dtype, each_isa):
    torch.manual_seed(2)
    for window in (1, 2, 3, 5):
        case = attention_case(dtype, [50, 0], [100, 130], kv_heads=1, group=2, window=window)
        # A chain: every row but the first few has left its root behind.
        start = int(case.row_start[1])
        chain = torch.ones(130, 192, dtype=torch.bool).tril().view(130, 3, 64).long()
        case.masks[start : start + 130] = (chain << torch.arange(64)).sum(-1)
        check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(dtype, each_isa, threads):
    for used in (1, 3):
        threads(used)
        torch.manual_seed(3)
        case = attention_case(dtype, [900, 4], [9, 3], sinks=True, sharpness=2.0)
        check(case)
        # Larger and smaller than every score by far, and none at all.
        case.sinks[:4] = torch.tensor([3e4, -3e4, -torch.inf, 80.0])
        out = run(case)
        check(case, out)
        assert (out[case.covered()][:, 0] == 0).all()
        assert torch.equal(out[:, 1:3], run(case.but(sinks=None))[:, 1:3])


def test_a_row_that_its_mask_leaves_out_counts_as_one(each_isa):
    """As on CUDA, where the first block that is read is known before the masks are."""
    torch.manual_seed(12)
    case = attention_case(torch.float32, [64], [3], block_size=16, window=17)
    case.masks[int(case.row_start[0]) + 1] = 0
    check(case)


def test_a_row_that_sees_nothing_is_zero_beside_a_sink(each_isa):
    torch.manual_seed(4)
    case = attention_case(torch.float32, [0], [5], sinks=True)
    row = int(case.row_start[0]) + 3
    case.masks[row] = 0
    assert (run(case)[row] == 0).all()
    check(case)


@pytest.mark.parametrize("seed", range(16))
def test_random_sweep(seed, threads):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    threads(rng.choice([1, 2, 4, 16]))
    check(
        attention_case(
            **random_sizes(rng, DTYPES, 2000),
            softcap=rng.choice([0.0, 5.0, 30.0]),
            sharpness=rng.choice([1.0, 8.0]),
            window=rng.choice([0, rng.randint(1, 20), rng.randint(21, 700)]),
            sinks=rng.random() < 0.5,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_that_holds_everything_changes_no_bit(dtype, each_isa, threads):
    for used in (1, 4):
        threads(used)
        torch.manual_seed(5)
        case = attention_case(dtype, [700, 31, 0], [12, 70, 2], softcap=9.0)
        plain = run(case)
        assert torch.equal(plain, run(case.but(window=2**40)))
        assert torch.equal(plain, run(case.but(window=712)))
        assert not torch.equal(plain, run(case.but(window=700)))


def test_what_left_every_window_is_not_read(each_isa):
    """Whatever a number of a freed block names: NaN of another request, or no block at all."""
    torch.manual_seed(6)
    for dtype in DTYPES:
        case = attention_case(dtype, [500], [8], block_size=32, window=100)
        clean = run(case)
        table = case.block_table.clone()
        table[case.request_index[0], : (500 + 1 - 100) // 32] = 0
        of_another = set(case.block_table[case.request_index[0]].tolist())
        if 0 not in of_another:
            case.key_cache[0], case.value_cache[0] = torch.nan, torch.nan
        assert torch.equal(run(case.but(block_table=table)), clean)
        # The control: the first block that is still needed.
        table[case.request_index[0], (500 + 1 - 100) // 32] = -1
        with pytest.raises(RuntimeError, match=r"block_table\[.*\] is -1"):
            run(case.but(block_table=table))


def test_a_window_by_row_is_noticed():
    """Negative control: counted from the row's number in the tree and not from its depth."""
    torch.manual_seed(7)
    case = attention_case(torch.float32, [60], [12], window=20)
    start = int(case.row_start[0])
    # Two branches of five from the root.
    parents = [-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0]
    sees = torch.eye(12, dtype=torch.bool)
    for row, parent in enumerate(parents[1:], start=1):
        sees[row] |= sees[parent]
    case.masks[start : start + 12, 0] = (sees.long() << torch.arange(12)).sum(-1)
    out = run(case)
    assert excess(case, out) <= 1.0

    exact, _ = case.exact()
    row = start + 9  # at depth 4: a window by row would begin five keys later
    wrong = case.but(window=20 - 5)
    wrong_out = run(wrong)
    assert excess(wrong, wrong_out) <= 1.0
    assert float((wrong_out[row] - exact[row]).abs().max()) > 1e-3
    assert excess(case, wrong_out) > 100


def test_a_sink_that_is_left_out_is_noticed():
    torch.manual_seed(8)
    case = attention_case(torch.float32, [60], [12], sinks=True)
    assert excess(case, run(case.but(sinks=None))) > 100
    assert excess(case, run(case.but(sinks=case.sinks.roll(1)))) > 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.manual_seed(9)
    case = attention_case(
        dtype, [20, 3], [4, 2], kv_heads=1, group=2, block_size=16, window=7, sinks=True
    )
    case.key_cache.nan_to_num_(0.0)
    case.value_cache.nan_to_num_(0.0)
    torch.library.opcheck(
        torch.ops.redrafter.tree_attention.default, (torch.zeros_like(case.query), *case.args())
    )


def test_without_the_library_the_twin_answers(monkeypatch):
    torch.manual_seed(10)
    case = attention_case(torch.float32, [40, 3], [4, 2], window=9, sinks=True)
    compiled = run(case)
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    torch.testing.assert_close(compiled, run(case), atol=1e-5, rtol=1e-5)


def test_bad_arguments():
    torch.manual_seed(11)
    case = attention_case(torch.float32, [20, 3], [4, 2], sinks=True)
    for changes, message in [
        ({"window": -1}, "window is -1; it must be 0"),
        ({"sinks": case.sinks[:3]}, "sinks has 3 elements; it must have 9"),
        ({"sinks": case.sinks.double()}, "sinks has dtype Double"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(case.but(**changes))
