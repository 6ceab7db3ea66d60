# SPDX-License-Identifier: Apache-2.0
"""Moving tokens inside the paged KV cache, in all layers at once.

After a walk the accepted path's keys and values must lie directly behind the root. Positions were
right when they were written (position = context + depth), so moving rows is exact
(arXiv 2403.09919, section 3.3; Apple's ``_update_kv_cache_and_input_ids``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.ops import reference
from vllm_redrafter.ops.kv_layout import tag
from vllm_redrafter.ops.library import compiled_available

# Columns of the table of caches; csrc/cpu/move_kv.cpp names them.
TABLE_COLUMNS = 8


class MoveKV:
    """Copies token rows between slots of the caches of one KV group.

    The addresses of the caches are collected once, which makes a call as cheap for 30 layers as
    for one. The caches must stay where they are; this object keeps them alive.

    Args:
        key_caches: per layer ``[blocks, kv_heads, block_size, head_dim]``, any strides in the
            first two dimensions; a (block, head) region is ``block_size * head_dim`` consecutive
            elements of 1, 2 or 4 bytes, which are moved as bits. No cache may be listed twice.
        value_caches: the same for V.
        key_map: int32 ``[block_size * head_dim]``, where feature d of token t lies in a region of
            K, at index ``t * head_dim + d``. One map serves all layers.
        value_map: the same for V.

    Raises:
        ValueError: caches of different block size, head size or element size, an element size
            other than 1, 2 and 4, or a map that is not a permutation.
    """

    def __init__(
        self,
        key_caches: list[Tensor],
        value_caches: list[Tensor],
        key_map: Tensor,
        value_map: Tensor,
    ) -> None:
        if not key_caches or len(key_caches) != len(value_caches):
            raise ValueError(
                f"A KV group needs as many value caches as key caches and at least one, got "
                f"{len(key_caches)} and {len(value_caches)}."
            )
        kinds = {
            (cache.shape[2], cache.shape[3], cache.element_size())
            for cache in (*key_caches, *value_caches)
        }
        if len(kinds) != 1:
            raise ValueError(
                "All caches of a KV group must have the same block size, head size and element "
                f"size; these have {sorted(kinds)}."
            )
        self.block_size, self.head_dim, self.element_size = kinds.pop()
        if self.element_size not in (1, 2, 4):
            raise ValueError(
                f"A cache element has {self.element_size} bytes; 1, 2 or 4 can be moved."
            )
        self.key_caches, self.value_caches = list(key_caches), list(value_caches)
        self.key_map = tag(key_map, self.block_size, self.head_dim)
        self.value_map = tag(value_map, self.block_size, self.head_dim)
        rows = zip(key_caches, value_caches, strict=True)
        self.table = torch.tensor([_table_row(key, value) for key, value in rows])

    def __call__(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy K and V of every slot ``src_slots[i]`` to slot ``dst_slots[i]``, in every layer.

        All sources are read before any destination is written, so the two may overlap in any way.

        Args:
            src_slots: int64 ``[M]``, block * block_size + offset in the block.
            dst_slots: int64 ``[M]``, no slot twice.

        Raises:
            RuntimeError: a slot outside the cache (compiled operator).
        """
        if compiled_available() and self.table.device == self.key_caches[0].device:
            torch.ops.redrafter.move_kv.default(
                self.table, self.key_map, self.value_map, src_slots, dst_slots,
                self.block_size, self.head_dim, self.element_size,
            )  # fmt: skip
        else:
            reference.move_kv(
                self.key_caches, self.value_caches, self.key_map, self.value_map,
                src_slots, dst_slots,
            )  # fmt: skip


def _table_row(key: Tensor, value: Tensor) -> list[int]:
    size = key.element_size()
    return [
        key.data_ptr(), value.data_ptr(),
        key.stride(0) * size, key.stride(1) * size,
        value.stride(0) * size, value.stride(1) * size,
        key.shape[1], key.shape[0],
    ]  # fmt: skip


if compiled_available():

    @torch.library.register_fake("redrafter::move_kv")
    def _(caches: Tensor, *rest: object) -> None:
        """Nothing to compute: it has no result, and fake caches have no addresses."""
        torch._check(
            caches.shape[1] == TABLE_COLUMNS, lambda: f"caches must have {TABLE_COLUMNS} columns."
        )
