# SPDX-License-Identifier: Apache-2.0
"""tree_attention's CUDA kernels, emulated or on a GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import AttentionCase, attention_case, by_strides

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(case: AttentionCase, device: torch.device) -> AttentionCase:
    tensors = {k: v.to(device) for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    return replace(case, **tensors)


def run(operators, device: torch.device, case: AttentionCase) -> torch.Tensor:
    there = moved(case, device)
    out = torch.full(case.query.shape, 77.0, dtype=case.query.dtype, device=device)
    operators.tree_attention(out, *there.args())
    return out.cpu()


def assert_right(out: torch.Tensor, case: AttentionCase) -> None:
    exact, size = case.exact()
    covered = case.covered()
    # float32: sums of up to some hundred terms in another order. 16 bits: besides, each weight and
    # the result are rounded once to eps / 2 of themselves.
    eps = 3e-6 if case.query.dtype == torch.float32 else torch.finfo(case.query.dtype).eps * 1.05
    error = (out.double() - exact).abs()[covered]
    assert (error <= eps * size[covered] + 1e-6).all(), float(error.max())
    assert (out[~covered] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("contexts", "rows"),
    [
        ([0], [1]),
        ([37], [8]),
        ([0, 5, 64, 63], [5, 1, 16, 3]),
        ([200], [30]),
        ([31, 0, 130], [0, 1, 2]),
        ([16], [90]),
    ],
)
def test_ragged_batches(device_ops, dtype, contexts, rows):
    torch.manual_seed(len(contexts) + sum(rows))
    case = by_strides(attention_case(dtype, contexts, rows, block_size=16))
    assert_right(run(*device_ops, case), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(device_ops, dtype, head_dim):
    torch.manual_seed(head_dim)
    case = attention_case(dtype, [70, 3], [5, 9], head_dim=head_dim, kv_heads=2, group=2,
                          block_size=16)  # fmt: skip
    case = by_strides(case, interleaved=True)
    assert_right(run(*device_ops, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 7])
def test_pieces_of_a_long_context(device_ops, dtype, group):
    torch.manual_seed(group)
    case = by_strides(
        attention_case(dtype, [700, 520], [6, 2], kv_heads=1, group=group, sharpness=3.0)
    )
    # Room for more keys than there are: some pieces are empty.
    table = torch.full((case.block_table.shape[0], 64), -1, dtype=torch.int32)
    table[:, : case.block_table.shape[1]] = case.block_table
    case = case.but(block_table=table)
    assert_right(run(*device_ops, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(device_ops, dtype):
    torch.manual_seed(0)
    case = by_strides(attention_case(dtype, [50], [7], softcap=4.0, sharpness=4.0))
    assert_right(run(*device_ops, case), case)


def test_head_sizes_without_tensor_cores(device_ops):
    torch.manual_seed(0)
    case = by_strides(attention_case(torch.bfloat16, [40], [5], head_dim=48))
    assert_right(run(*device_ops, case), case)


def test_strides_that_no_vector_fits(device_ops):
    torch.manual_seed(0)
    case = by_strides(attention_case(torch.bfloat16, [40], [5]))
    odd = torch.full((*case.key_cache.shape[:3], 65), torch.nan, dtype=torch.bfloat16)[..., :64]
    odd.copy_(case.key_cache)
    query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    case = case.but(key_cache=odd, query=query)
    assert_right(run(*device_ops, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 3, 16, 33, 64, 500])
def test_windows(device_ops, dtype, window):
    """Blocks in front of a window have no numbers; narrow windows end within a tree."""
    torch.manual_seed(window)
    case = attention_case(
        dtype, [0, 5, 64, 130], [5, 1, 16, 70], kv_heads=1, group=2, block_size=16, window=window,
        softcap=9.0 if window == 16 else 0.0,
    )  # fmt: skip
    case = by_strides(case)
    assert_right(run(*device_ops, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_and_sinks_in_pieces(device_ops, dtype, window, sinks):
    torch.manual_seed(window)
    case = by_strides(
        attention_case(dtype, [1400, 520, 3], [6, 2, 1], kv_heads=1, group=2, window=window,
                       sinks=sinks, sharpness=2.0)
    )  # fmt: skip
    assert_right(run(*device_ops, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(device_ops, dtype):
    torch.manual_seed(1)
    case = by_strides(attention_case(dtype, [40], [7], kv_heads=2, group=2, sinks=True))
    case.sinks[:3] = torch.tensor([3e4, -3e4, -torch.inf])
    case.masks[int(case.row_start[0]) + 2] = 0
    out = run(*device_ops, case)
    assert_right(out, case)
    assert (out[case.covered()][:, 0] == 0).all()


def test_a_window_and_a_sink_that_are_left_out_are_noticed(device_ops):
    torch.manual_seed(2)
    case = by_strides(attention_case(torch.float32, [60], [6], window=20, sinks=True))
    whole = case.block_table.clone()
    whole[whole < 0] = 0
    for changes in ({"window": 21}, {"window": 19}, {"sinks": None}):
        out = run(*device_ops, case.but(block_table=whole, **changes))
        with pytest.raises(AssertionError):
            assert_right(out, case)


def test_a_row_that_sees_nothing_gets_zeros(device_ops):
    torch.manual_seed(0)
    case = by_strides(attention_case(torch.bfloat16, [0], [3]))
    start = int(case.row_start[0])
    case.masks[start + 1] = 0
    out = run(*device_ops, case)
    assert (out[start + 1] == 0).all()
    assert_right(out, case)


def test_no_requests(device_ops):
    case = by_strides(attention_case(torch.bfloat16, [], []))
    assert (run(*device_ops, case) == 77).all()


def test_a_wrong_mask_is_noticed(device_ops):
    """Negative control: one row that sees one sibling too many."""
    torch.manual_seed(0)
    case = by_strides(attention_case(torch.bfloat16, [20], [6]))
    wrong = case.masks.clone()
    wrong[int(case.row_start[0]) + 1] |= 1 << 5
    out = run(*device_ops, case.but(masks=wrong))
    with pytest.raises(AssertionError):
        assert_right(out, case)


def test_blocks_outside_the_cache_are_not_read(device_ops):
    torch.manual_seed(0)
    case = by_strides(attention_case(torch.bfloat16, [40], [4], block_size=16))
    case.block_table[int(case.request_index[0]), 1] = 10_000
    out = run(*device_ops, case)
    assert out[case.covered()].isfinite().all()


def test_maps_are_refused(device_ops):
    operators, device = device_ops
    case = attention_case(torch.bfloat16, [4], [2])
    with pytest.raises(RuntimeError, match="on CUDA pass None"):
        run(operators, device, case)
