# SPDX-License-Identifier: Apache-2.0
"""move_kv's CUDA kernel, emulated or on a GPU: bits, read before write, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_redrafter.ops import reference
from vllm_redrafter.ops.move_kv import MoveKV

BLOCKS, BLOCK_SIZE = 6, 16
SLOTS = BLOCKS * BLOCK_SIZE
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)


class Layer:
    """One layer's K and V with random bits, NaN patterns included."""

    def __init__(
        self, dtype: torch.dtype, dim: int, heads: int, interleaved: bool, blocks: int = BLOCKS
    ) -> None:
        row = dim * torch.empty((), dtype=dtype).element_size()
        # Interleaved: tokens before heads in memory, K and V side by side.
        shape = (
            (blocks, BLOCK_SIZE, heads, 2 * row)
            if interleaved
            else (2, blocks, heads, BLOCK_SIZE, row)
        )
        self.raw = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.dtype, self.dim, self.interleaved = dtype, dim, interleaved

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """K and V there, in memory of their own."""
        raw = self.raw.to(device, copy=True).view(self.dtype)
        if self.interleaved:
            key, value = raw.transpose(1, 2).split(self.dim, -1)
            return key, value
        return raw[0], raw[1]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def by_kernel(device_ops, layers: list[Layer], src: list[int], dst: list[int]) -> list[Tensor]:
    """Bits of K and V of all layers after the moves."""
    operators, device = device_ops
    there = [layer.on(device) for layer in layers]
    mover = MoveKV([k for k, _ in there], [v for _, v in there])
    slots = [torch.tensor(x, dtype=torch.int64, device=device) for x in (src, dst)]
    operators.move_kv(
        mover.table, None, None, *slots, mover.block_size, mover.head_dim, mover.element_size
    )
    return [bits(cache) for layer in there for cache in layer]


def by_twin(layers: list[Layer], src: list[int], dst: list[int]) -> list[Tensor]:
    here = [layer.on(torch.device("cpu")) for layer in layers]
    slots = [torch.tensor(x, dtype=torch.int64) for x in (src, dst)]
    reference.move_kv([k for k, _ in here], [v for _, v in here], None, None, *slots)
    return [bits(cache) for layer in here for cache in layer]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_chains_and_permutations(device_ops, dtype, interleaved):
    torch.manual_seed(0)
    layers = [Layer(dtype, 64, heads, interleaved) for heads in (3, 9)]
    for src, dst in [
        ([20, 23, 25, 27, 62, 63, 70], [20, 21, 22, 23, 61, 62, 63]),
        ([10, 11, 12, 40], [11, 12, 13, 10]),
        (torch.randperm(SLOTS).tolist(), list(range(SLOTS))),
        ([], []),
    ]:
        assert_same(by_kernel(device_ops, layers, src, dst), by_twin(layers, src, dst))


def test_moves_that_are_none(device_ops):
    """-1 fills a list up; beyond the cache nothing is read or written."""
    torch.manual_seed(1)
    layers = [Layer(torch.bfloat16, 64, 2, True)]
    found = by_kernel(device_ops, layers, [-1, 5, SLOTS, 7], [3, -1, 4, SLOTS + 9])
    assert_same(found, [bits(c) for c in layers[0].on(torch.device("cpu"))])
    src, dst = [-1, 9, -1], [-1, 8, 7]
    assert_same(by_kernel(device_ops, layers, src, dst), by_twin(layers, src, dst))


@pytest.mark.parametrize("dim", [1, 3, 20, 136])
def test_rows_of_any_length(device_ops, dim):
    torch.manual_seed(dim)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        layers = [Layer(dtype, dim, 2, False)]
        src, dst = [4, 5, 6, 80], [5, 6, 7, 4]
        assert_same(by_kernel(device_ops, layers, src, dst), by_twin(layers, src, dst))


def test_more_moves_than_whole_rows_fit(device_ops):
    """Columns become narrow, so that all moves are staged together."""
    torch.manual_seed(2)
    layers = [Layer(torch.float32, 128, 1, False, blocks=80)]
    src, dst = torch.randperm(80 * BLOCK_SIZE).tolist(), list(range(80 * BLOCK_SIZE))
    assert_same(by_kernel(device_ops, layers, src, dst), by_twin(layers, src, dst))


def test_copying_in_order_would_be_noticed(device_ops):
    """Negative control: row by row, in place."""
    torch.manual_seed(3)
    layers = [Layer(torch.bfloat16, 64, 2, False)]
    src, dst = [10, 11, 12], [11, 12, 13]
    found = by_kernel(device_ops, layers, src, dst)
    wrong = layers[0].on(torch.device("cpu"))
    for cache in wrong:
        for s, d in zip(src, dst, strict=True):
            cache[d // BLOCK_SIZE, :, d % BLOCK_SIZE] = cache[s // BLOCK_SIZE, :, s % BLOCK_SIZE]
    with pytest.raises(AssertionError):
        assert_same(found, [bits(cache) for cache in wrong])
