# SPDX-License-Identifier: Apache-2.0
"""The compiled move_kv: bits, read before write, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import LAYOUTS, layout_maps, write_tokens
from torch import Tensor

from vllm_redrafter.ops import move_kv as module
from vllm_redrafter.ops import reference
from vllm_redrafter.ops.kv_layout import offsets
from vllm_redrafter.ops.move_kv import MoveKV

BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM = 6, 3, 16, 32
SLOTS = BLOCKS * BLOCK_SIZE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)


class Caches:
    """Layers with random bits (NaN patterns included), K and V of one layer in one tensor."""

    def __init__(self, dtype: torch.dtype, layout: str, layers: int = 3) -> None:
        size = torch.empty((), dtype=dtype).element_size()
        shape = (BLOCKS, HEADS, 2 * BLOCK_SIZE, HEAD_DIM * size)
        self.raw = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(layers)]
        halves = [raw.view(dtype).chunk(2, dim=2) for raw in self.raw]
        self.keys = [key for key, _ in halves]
        self.values = [value for _, value in halves]
        self.key_map, self.value_map = layout_maps(layout, BLOCK_SIZE, HEAD_DIM)

    def mover(self) -> MoveKV:
        return MoveKV(self.keys, self.values, self.key_map, self.value_map)

    def tokens(self) -> list[Tensor]:
        """Per layer and half, bits of all slots ``[slots, heads, head_dim]``."""
        found = []
        for caches, cache_map in ((self.keys, self.key_map), (self.values, self.value_map)):
            at = offsets(cache_map, BLOCK_SIZE, HEAD_DIM)
            for cache in caches:
                bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
                regions = cache.view(bits).as_strided(
                    (BLOCKS, HEADS, BLOCK_SIZE * HEAD_DIM), (cache.stride(0), cache.stride(1), 1)
                )
                found.append(regions[:, :, at].transpose(1, 2).flatten(0, 1))
        return found


def moved(before: Tensor, src: list[int], dst: list[int]) -> Tensor:
    after = before.clone()
    after[dst] = before[src]
    return after


def in_order(before: Tensor, src: list[int], dst: list[int]) -> Tensor:
    """The wrong rule: copy one row after the other, in place."""
    after = before.clone()
    for s, d in zip(src, dst, strict=True):
        after[d] = after[s]
    return after


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_overlapping_path(dtype, layout):
    """Path nodes 0, 3, 5, 7 go to slots 0, 1, 2, 3; a second request's path in other blocks."""
    torch.manual_seed(0)
    caches = Caches(dtype, layout)
    before = [t.clone() for t in caches.tokens()]
    src = [20, 23, 25, 27, 62, 63, 70]
    dst = [20, 21, 22, 23, 61, 62, 63]
    caches.mover()(torch.tensor(src), torch.tensor(dst))
    for old, new in zip(before, caches.tokens(), strict=True):
        assert torch.equal(new, moved(old, src, dst))


def test_every_source_is_read_first(threads):
    """A chain that shifts rows up is destroyed by copying in order: the test must see that."""
    torch.manual_seed(1)
    for count in (1, 2, 4):
        threads(count)
        caches = Caches(torch.bfloat16, "vector")
        before = [t.clone() for t in caches.tokens()]
        src, dst = [10, 11, 12, 40], [11, 12, 13, 10]
        caches.mover()(torch.tensor(src), torch.tensor(dst))
        for old, new in zip(before, caches.tokens(), strict=True):
            assert torch.equal(new, moved(old, src, dst))
            assert not torch.equal(new, in_order(old, src, dst))


def test_many_moves_on_several_threads(threads):
    """Enough elements that layers are shared out: kFewElements in csrc/cpu/move_kv.cpp."""
    torch.manual_seed(4)
    threads(3)
    caches = Caches(torch.bfloat16, "vector", layers=8)
    before = [t.clone() for t in caches.tokens()]
    src, dst = torch.randperm(SLOTS)[:70], torch.randperm(SLOTS)[:70]
    assert 8 * HEADS * HEAD_DIM * 70 > 1 << 15
    caches.mover()(src, dst)
    for old, new in zip(before, caches.tokens(), strict=True):
        assert torch.equal(new, moved(old, src.tolist(), dst.tolist()))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_moves_equal_the_twin(data):
    count = data.draw(st.integers(0, 20))
    dst = data.draw(
        st.lists(st.integers(0, SLOTS - 1), min_size=count, max_size=count, unique=True)
    )
    src = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=count, max_size=count))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.uint8)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    caches = Caches(dtype, data.draw(st.sampled_from(LAYOUTS)))
    twin = Caches(dtype, "vector")
    for target, source in zip(twin.raw, caches.raw, strict=True):
        target.copy_(source)
    source_slots = torch.tensor(src, dtype=torch.int64)
    target_slots = torch.tensor(dst, dtype=torch.int64)
    caches.mover()(source_slots, target_slots)
    reference.move_kv(
        twin.keys, twin.values, caches.key_map, caches.value_map, source_slots, target_slots
    )
    assert all(torch.equal(a, b) for a, b in zip(caches.raw, twin.raw, strict=True))


def test_layers_of_other_strides_and_blocks():
    """Each layer has its own addresses, strides and number of blocks."""
    torch.manual_seed(2)
    key_map, value_map = layout_maps("vector", BLOCK_SIZE, HEAD_DIM)
    keys = [torch.zeros(HEADS, blocks, BLOCK_SIZE, HEAD_DIM).transpose(0, 1) for blocks in (6, 9)]
    values = [torch.zeros(blocks, HEADS, 3, BLOCK_SIZE, HEAD_DIM)[:, :, 1] for blocks in (6, 9)]
    rows = torch.randn(2, HEADS, HEAD_DIM)
    for key, value in zip(keys, values, strict=True):
        write_tokens(key, key_map, torch.tensor([30, 35]), rows)
        write_tokens(value, value_map, torch.tensor([30, 35]), rows)
    MoveKV(keys, values, key_map, value_map)(torch.tensor([30, 35]), torch.tensor([80, 30]))
    wanted_keys = [torch.zeros_like(key) for key in keys]
    wanted_values = [torch.zeros_like(value) for value in values]
    for key, value in zip(wanted_keys, wanted_values, strict=True):
        slots, moved_rows = torch.tensor([30, 35, 80]), rows[[1, 1, 0]]
        write_tokens(key, key_map, slots, moved_rows)
        write_tokens(value, value_map, slots, moved_rows)
    for found, wanted in zip(keys + values, wanted_keys + wanted_values, strict=True):
        assert torch.equal(found, wanted)


def test_bad_arguments():
    caches = Caches(torch.float32, "vector")
    mover = caches.mover()
    with pytest.raises(RuntimeError, match="slot 3 to 96; the cache has slots 0 to 95"):
        mover(torch.tensor([3]), torch.tensor([96]))
    with pytest.raises(RuntimeError, match="dst_slots has 2 elements; it must have 1"):
        mover(torch.tensor([3]), torch.tensor([4, 5]))
    with pytest.raises(RuntimeError, match="src_slots has dtype Int"):
        mover(torch.tensor([3], dtype=torch.int32), torch.tensor([4]))
    with pytest.raises(ValueError, match="same block size"):
        MoveKV(caches.keys, [v[:, :, :8] for v in caches.values], caches.key_map, caches.value_map)
    with pytest.raises(ValueError, match="permutation"):
        MoveKV(caches.keys, caches.values, caches.key_map[:5], caches.value_map)
    with pytest.raises(ValueError, match="8 bytes"):
        wide = [k.double() for k in caches.keys]
        MoveKV(wide, wide, caches.key_map, caches.value_map)
    with pytest.raises(ValueError, match="as many value caches"):
        MoveKV(caches.keys, caches.values[:1], caches.key_map, caches.value_map)


@pytest.mark.parametrize("wild", [-1, 2**31 - 1])
def test_a_map_that_leads_out_of_its_region_is_refused(wild):
    caches = Caches(torch.float32, "random")
    mover = caches.mover()
    mover.key_map[37 % BLOCK_SIZE * HEAD_DIM] = wild
    mover(torch.tensor([3]), torch.tensor([4]))  # others are as good as before
    with pytest.raises(RuntimeError, match=f"A map holds {wild}; a region has elements 0 to"):
        mover(torch.tensor([3]), torch.tensor([37]))


def test_without_the_library_the_twin_answers(monkeypatch):
    torch.manual_seed(3)
    caches = Caches(torch.bfloat16, "random")
    before = [t.clone() for t in caches.tokens()]
    mover = caches.mover()
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    monkeypatch.setattr(torch.ops.redrafter.move_kv, "default", None)  # a call would be an error
    mover(torch.tensor([5, 6]), torch.tensor([4, 5]))
    for old, new in zip(before, caches.tokens(), strict=True):
        assert torch.equal(new, moved(old, [5, 6], [4, 5]))


def test_opcheck():
    caches = Caches(torch.float32, "vector")
    mover = caches.mover()
    torch.library.opcheck(
        torch.ops.redrafter.move_kv.default,
        (mover.table, mover.key_map, mover.value_map, torch.tensor([3, 4]), torch.tensor([2, 3]),
         BLOCK_SIZE, HEAD_DIM, 4),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_maps_strides_say_where_tokens_are(dtype):
    """K and V side by side in the last dimension, tokens before heads in memory."""
    torch.manual_seed(5)
    size = torch.empty((), dtype=dtype).element_size()
    shape = (BLOCKS, BLOCK_SIZE, HEADS, 2 * HEAD_DIM * size)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = raw.clone().flatten(0, 1)
    key, value = raw.view(dtype).transpose(1, 2).split(HEAD_DIM, -1)
    src, dst = [20, 21, -1, 40, 7], [21, 22, 3, -1, 20]
    MoveKV([key], [value])(torch.tensor(src), torch.tensor(dst))
    assert torch.equal(raw.flatten(0, 1), moved(before, [20, 21, 7], [21, 22, 20]))


def test_features_must_be_consecutive_without_maps():
    cache = torch.zeros(BLOCKS, HEADS, HEAD_DIM, BLOCK_SIZE).transpose(2, 3)
    with pytest.raises(ValueError, match="features of a token must be consecutive"):
        MoveKV([cache], [cache.clone()])
