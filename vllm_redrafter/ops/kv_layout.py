# SPDX-License-Identifier: Apache-2.0
"""Maps of a cache region: where feature d of token t of a block lies.

A map is int32 ``[block_size * head_dim]``, offsets in elements at index ``t * head_dim + d``. An
operator that gets such a map first has to find out whether it is one of the layouts that it has a
quick path for; ``tag`` does that once and appends the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.ops.library import library


def tag(cache_map: Tensor, block_size: int, head_dim: int) -> Tensor:
    """``cache_map`` with one more entry, the layout that the compiled operators recognise in it.

    Operators take maps with and without it; with it a call is some microseconds shorter. Without
    the compiled operators, or if it is there already, the map comes back as it is.

    Raises:
        ValueError: the map is not a permutation of a region of that size.
    """
    entries = block_size * head_dim
    if cache_map.numel() == entries + 1:
        return cache_map
    cache_map = cache_map.to(torch.int32).contiguous()
    if not torch.equal(cache_map.sort().values, torch.arange(entries, dtype=torch.int32)):
        raise ValueError(
            f"A cache map of {block_size} tokens and {head_dim} features must be a permutation of "
            f"0 .. {entries - 1}; this one has {cache_map.numel()} entries and is not."
        )
    handle = library()
    if handle is None:
        return cache_map
    layout = handle.redrafter_recognise_layout(cache_map.data_ptr(), block_size, head_dim)
    return torch.cat([cache_map, torch.tensor([layout], dtype=torch.int32)])


def offsets(cache_map: Tensor, block_size: int, head_dim: int) -> Tensor:
    """The map as int64 ``[block_size, head_dim]``, without a tag."""
    return cache_map[: block_size * head_dim].long().view(block_size, head_dim)
