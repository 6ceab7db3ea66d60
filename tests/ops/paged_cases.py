# SPDX-License-Identifier: Apache-2.0
"""Random paged caches, layouts and trees for the operator tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.ops import reference

LAYOUTS = ("vector", "amx", "random")


def layout_maps(layout: str, block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """key_map and value_map: vLLM's two layouts, and one that is nobody's."""
    token, feature = torch.arange(block_size)[:, None], torch.arange(head_dim)
    if layout == "vector":
        key, value = feature * block_size + token, token * head_dim + feature
    elif layout == "amx":
        key = token // 16 * 16 * head_dim + feature // 2 * 32 + token % 16 * 2 + feature % 2
        value = feature // 16 * 16 * block_size + token // 2 * 32 + feature % 16 * 2 + token % 2
    else:
        key, value = torch.randperm(block_size * head_dim), torch.randperm(block_size * head_dim)
    return key.flatten().to(torch.int32), value.flatten().to(torch.int32)


def write_tokens(cache: Tensor, cache_map: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Put ``rows`` ``[n, kv_heads, head_dim]`` into the slots of a paged cache."""
    blocks, heads, block_size, head_dim = cache.shape
    regions = cache.as_strided(
        (blocks, heads, block_size * head_dim), (cache.stride(0), cache.stride(1), 1)
    )
    offsets = cache_map[: block_size * head_dim].long().view(block_size, head_dim)
    at = offsets[slots % block_size]
    regions[(slots // block_size)[:, None, None], torch.arange(heads)[:, None], at[:, None]] = rows


def random_tree_masks(rows: int, words: int) -> Tensor:
    """Ancestor masks ``[rows, words]`` of a random tree."""
    sees = torch.eye(words * 64, dtype=torch.bool)[:rows]
    for row in range(1, rows):
        sees[row] |= sees[int(torch.randint(row, ()))]
    shift = torch.arange(64)
    return (sees.view(rows, words, 64).long() << shift).sum(-1)


@dataclass
class AttentionCase:
    """Arguments of tree_attention, in its order after ``out``."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    key_map: Tensor
    value_map: Tensor
    block_table: Tensor
    request_index: Tensor
    row_start: Tensor
    row_count: Tensor
    context_lens: Tensor
    masks: Tensor
    scale: float
    softcap: float
    window: int = 0
    sinks: Tensor | None = None

    def args(self) -> tuple:
        return tuple(vars(self).values())

    def but(self, **changes: object) -> AttentionCase:
        return replace(self, **changes)

    def covered(self) -> Tensor:
        """Which query rows belong to a request, bool ``[T]``."""
        mask = torch.zeros(self.query.shape[0], dtype=torch.bool)
        for start, count in zip(self.row_start.tolist(), self.row_count.tolist(), strict=True):
            mask[start : start + count] = True
        return mask

    def exact(self) -> tuple[Tensor, Tensor]:
        """The float64 result, and the same with absolute values: what rounding is relative to."""
        result = torch.zeros(self.query.shape, dtype=torch.float64)
        reference.tree_attention(result, *self.args(), compute_dtype=torch.float64)
        size = torch.zeros_like(result)
        absolute = self.but(value_cache=self.value_cache.abs())
        reference.tree_attention(size, *absolute.args(), compute_dtype=torch.float64)
        return result, size


def random_sizes(rng: random.Random, dtypes: Sequence[torch.dtype], longest: int) -> dict[str, Any]:
    """Arguments of ``attention_case``: contexts of up to ``longest`` tokens, and all sizes."""
    requests = rng.randint(1, 6)
    return {
        "dtype": rng.choice(dtypes),
        "contexts": [
            rng.choice([0, rng.randint(1, 40), rng.randint(41, longest)]) for _ in range(requests)
        ],
        "rows": [
            rng.choice([1, rng.randint(2, 20), rng.randint(21, 140)]) for _ in range(requests)
        ],
        "head_dim": rng.choice([16, 64, 80, 112, 128]),
        "kv_heads": rng.randint(1, 4),
        "group": rng.randint(1, 5),
        "block_size": rng.choice([8, 16, 24, 32, 48, 64, 128]),
        "layout": rng.choice(["vector", "random"]),
    }


def attention_case(
    dtype: torch.dtype,
    contexts: list[int],
    rows: list[int],
    *,
    head_dim: int = 64,
    kv_heads: int = 3,
    group: int = 3,
    block_size: int = 32,
    layout: str = "vector",
    softcap: float = 0.0,
    sharpness: float = 1.0,
    window: int = 0,
    sinks: bool = False,
) -> AttentionCase:
    """Ragged requests in shuffled blocks. Every slot that holds no token of theirs is NaN.

    Blocks that lie in front of every row's window are nobody's: their numbers are none.
    """
    requests = len(contexts)
    needed = [-(-(c + r) // block_size) for c, r in zip(contexts, rows, strict=True)]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks)
    key_map, value_map = layout_maps(layout, block_size, head_dim)
    # K and V of a layer share memory, as in vLLM: [blocks, heads, 2 * block_size, head_dim].
    cache = torch.full((blocks, kv_heads, 2 * block_size, head_dim), torch.nan, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    # One row more than there are requests, and in another order.
    table = torch.full((requests + 1, max(needed, default=0) + 1), -1, dtype=torch.int32)
    request_index = torch.randperm(requests + 1)[:requests].to(torch.int32)
    words = max(1, -(-max(rows, default=1) // 64))
    total = sum(rows) + requests + 1
    masks = torch.zeros(total, words, dtype=torch.int64)
    starts, row = [], 1
    for r in range(requests):
        mine, order = order[: needed[r]], order[needed[r] :]
        table[request_index[r], : needed[r]] = mine.to(torch.int32)
        position = torch.arange(contexts[r] + rows[r])
        slots = mine[position // block_size] * block_size + position % block_size
        fresh = torch.randn(2, slots.numel(), kv_heads, head_dim).to(dtype)
        write_tokens(key_cache, key_map, slots, fresh[0])
        write_tokens(value_cache, value_map, slots, fresh[1])
        starts.append(row)
        masks[row : row + rows[r]] = random_tree_masks(rows[r], words)
        if window:  # a root sees the most: itself and so many before it
            gone = max(contexts[r] + 1 - window, 0) // block_size
            table[request_index[r], :gone] = -(2**31) + r
        row += rows[r] + 1
    return AttentionCase(
        query=(torch.randn(total, kv_heads * group, head_dim) * sharpness).to(dtype),
        key_cache=key_cache,
        value_cache=value_cache,
        key_map=key_map,
        value_map=value_map,
        block_table=table,
        request_index=request_index,
        row_start=torch.tensor(starts, dtype=torch.int32),
        row_count=torch.tensor(rows, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        masks=masks,
        scale=head_dim**-0.5,
        softcap=softcap,
        window=window,
        sinks=torch.randn(kv_heads * group) * 2 * sharpness if sinks else None,
    )


def by_strides(case: AttentionCase, *, interleaved: bool = False) -> AttentionCase:
    """The same tokens in caches without maps; K and V side by side in the last dimension or not."""
    blocks, heads, block_size, dim = case.key_cache.shape
    both = torch.full((2, blocks, heads, block_size, dim), torch.nan, dtype=case.query.dtype)
    for cache, cache_map, to in (
        (case.key_cache, case.key_map, both[0]),
        (case.value_cache, case.value_map, both[1]),
    ):
        offsets = cache_map[: block_size * dim].long()
        regions = cache.as_strided(
            (blocks, heads, block_size * dim), (cache.stride(0), cache.stride(1), 1)
        )
        to.copy_(regions[:, :, offsets].view(blocks, heads, block_size, dim))
    if interleaved:  # as vLLM 0.33 has it, tokens before heads in memory
        joined = torch.cat([both[0], both[1]], -1).transpose(1, 2).contiguous().transpose(1, 2)
        both = joined.split(dim, -1)
    return case.but(key_cache=both[0], value_cache=both[1], key_map=None, value_map=None)
