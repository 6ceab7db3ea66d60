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
from vllm_redrafter.ops.library import compiled_available, has_kernel

# Columns of the table of caches; csrc/common/move_kv_table.h names them.
TABLE_COLUMNS = 10


class MoveKV:
    """Copies token rows between slots of the caches of one KV group.

    The addresses of the caches are collected once, which makes a call as cheap for 30 layers as
    for one. The caches must stay where they are; this object keeps them alive.

    Args:
        key_caches: per layer ``[blocks, kv_heads, block_size, head_dim]``, elements of 1, 2 or 4
            bytes, which are moved as bits. Without a map any strides in the first three
            dimensions, features consecutive. With a map any strides in the first two; a (block,
            head) region is then ``block_size * head_dim`` consecutive elements. No cache may be
            listed twice.
        value_caches: the same for V; K and V may be interleaved in one tensor.
        key_map: None, or int32 ``[block_size * head_dim]``, where feature d of token t lies in a
            region of K, at index ``t * head_dim + d``. One map serves all layers. On the CPU only.
        value_map: the same for V.

    Raises:
        ValueError: caches of different block size, head size, element size or device, an element
            size other than 1, 2 and 4, features that are not consecutive, or a map that is not a
            permutation or for caches that are not on the CPU.
    """

    def __init__(
        self,
        key_caches: list[Tensor],
        value_caches: list[Tensor],
        key_map: Tensor | None = None,
        value_map: Tensor | None = None,
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
        devices = sorted({str(cache.device) for cache in (*key_caches, *value_caches)})
        if len(devices) != 1:
            raise ValueError(
                f"All caches of a KV group must be on one device, not {' and '.join(devices)}."
            )
        device = key_caches[0].device
        self.key_caches, self.value_caches = list(key_caches), list(value_caches)
        self.key_map = self._checked_map("key", self.key_caches, key_map)
        self.value_map = self._checked_map("value", self.value_caches, value_map)
        rows = zip(key_caches, value_caches, strict=True)
        self.table = torch.tensor([_table_row(key, value) for key, value in rows], device=device)

    def _checked_map(
        self, name: str, caches: list[Tensor], cache_map: Tensor | None
    ) -> Tensor | None:
        if cache_map is None:
            for cache in caches:
                if self.head_dim > 1 and cache.stride(3) != 1:
                    raise ValueError(
                        f"Without a map the features of a token must be consecutive; a {name} "
                        f"cache has strides {list(cache.stride())}."
                    )
            return None
        device = caches[0].device
        if device.type != "cpu":
            raise ValueError(
                f"Maps are for caches on the CPU; pass no {name}_map for caches on {device}."
            )
        return tag(cache_map, self.block_size, self.head_dim)

    def __call__(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy K and V of every slot ``src_slots[i]`` to slot ``dst_slots[i]``, in every layer.

        All sources are read before any destination is written, so the two may overlap in any way.

        A move with a negative source or destination is skipped, so that a list of fixed length can
        be filled up with -1. Beyond the last slot a move is an error on the CPU, and skipped on
        CUDA, where nothing is read back.

        Args:
            src_slots: int64 ``[M]``, block * block_size + offset in the block; on the caches'
                device.
            dst_slots: int64 ``[M]``, no slot twice.

        Raises:
            RuntimeError: on the CPU, a slot beyond the cache (compiled operator).
        """
        if has_kernel(self.table.device):
            torch.ops.redrafter.move_kv.default(
                self.table, self.key_map, self.value_map, src_slots, dst_slots,
                self.block_size, self.head_dim, self.element_size,
            )  # fmt: skip
        else:
            reference.move_kv(
                self.key_caches, self.value_caches, self.key_map, self.value_map,
                src_slots, dst_slots,
            )  # fmt: skip

    def read(self, slots: Tensor) -> list[Tensor]:
        """K and V at slots in every layer, ``[slots, heads, head_dim]`` of integers; for checks."""
        sides = (self.key_caches, self.key_map), (self.value_caches, self.value_map)
        return [
            reference.read_kv(cache, cache_map, slots)
            for caches, cache_map in sides
            for cache in caches
        ]


def _table_row(key: Tensor, value: Tensor) -> list[int]:
    size = key.element_size()
    return [
        key.data_ptr(), value.data_ptr(),
        key.stride(0) * size, key.stride(1) * size,
        value.stride(0) * size, value.stride(1) * size,
        key.shape[1], key.shape[0],
        key.stride(2) * size, value.stride(2) * size,
    ]  # fmt: skip


if compiled_available():

    @torch.library.register_fake("redrafter::move_kv")
    def _(caches: Tensor, *rest: object) -> None:
        """Nothing to compute: it has no result, and fake caches have no addresses."""
        torch._check(
            caches.shape[1] == TABLE_COLUMNS, lambda: f"caches must have {TABLE_COLUMNS} columns."
        )
