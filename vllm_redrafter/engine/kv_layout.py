# SPDX-License-Identifier: Apache-2.0
"""Where the CPU backend keeps one element of K or V inside a cache block.

vLLM's CPU kernels store K and V packed for the instruction set in use (column-major, VNNI pairs,
...), and the layouts are private. Instead of copying their formulas, known values are written
through vLLM's own cache update and read back: that gives exact maps for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.ops.kv_layout import tag

# Integers up to 256 are exact in every floating type that a cache may have.
_DIGIT = 256


@dataclass(frozen=True)
class KVLayout:
    """Index maps of one (block, head) region.

    Attributes:
        key_map: int32 ``[block_size * head_dim]``; element d of token t lies at offset
            ``key_map[t * head_dim + d]`` of the region's first half. Tagged for the compiled
            operators, see ``vllm_redrafter.ops.kv_layout``.
        value_map: the same for V and the second half.
    """

    key_map: Tensor
    value_map: Tensor


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of K and V, ``[blocks, kv_heads, block_size, head_dim]``, as vLLM's backend takes them.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
    """
    blocks, heads, block_size, _ = kv_cache.shape
    halves = kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)
    return halves[0], halves[1]


def probe_layout(layer: torch.nn.Module, kv_cache: Tensor) -> KVLayout:
    """Learn the layout of ``layer``'s cache by writing known values into a scratch block.

    Args:
        layer: a vLLM ``Attention`` whose backend is set up.
        kv_cache: its cache; only shape, dtype and strides are used.

    Raises:
        RuntimeError: the values read back are not a permutation, so the layout is unknown.
    """
    _, heads, block_size, width = kv_cache.shape
    head_dim = width // 2
    count = block_size * head_dim
    scratch = torch.zeros(2, heads, block_size, width, dtype=kv_cache.dtype)
    slots = torch.arange(block_size, 2 * block_size, dtype=torch.int64)
    index = torch.arange(count)
    found_key = torch.zeros(count, dtype=torch.int64)
    found_value = torch.zeros(count, dtype=torch.int64)
    scale = 1
    while scale < count:
        digit = (index // scale % _DIGIT).to(kv_cache.dtype).view(block_size, 1, head_dim)
        values = digit.expand(block_size, heads, head_dim).contiguous()
        layer.impl.do_kv_cache_update(layer, values, values, scratch, slots)
        key, value = split_cache(scratch)
        found_key += key[1, 0].flatten().long() * scale
        found_value += value[1, 0].flatten().long() * scale
        scale *= _DIGIT
    return KVLayout(
        tag(_inverse(found_key), block_size, head_dim),
        tag(_inverse(found_value), block_size, head_dim),
    )


def _inverse(element_at: Tensor) -> Tensor:
    """From "which element lies at this offset" to "at which offset lies this element"."""
    count = element_at.numel()
    if not torch.equal(element_at.sort().values, torch.arange(count)):
        raise RuntimeError("the KV cache layout of this vLLM build is not a permutation of rows")
    offsets = torch.empty(count, dtype=torch.int32)
    offsets[element_at] = torch.arange(count, dtype=torch.int32)
    return offsets
