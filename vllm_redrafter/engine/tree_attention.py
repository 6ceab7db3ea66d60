# SPDX-License-Identifier: Apache-2.0
"""Attention for steps that hold trees: vLLM's, and our op over its paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep, attend
from vllm_redrafter.ops.move_kv import MoveKV


def with_trees(stock: type, split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> type:
    """One of vLLM's implementations of attention, and ours for the rows of trees.

    Instances are never built: the layers of our own engine are given the class (see
    ``take_over``), so that other engines in the process keep vLLM's. A mixin would not do, because
    Python lets no object change to a class with further bases.

    Args:
        stock: vLLM's class.
        split: makes ``[blocks, kv_heads, block_size, head_dim]`` views of K and V of a cache.
    """

    class TreeAttention(stock):
        split_cache = staticmethod(split)
        # key_map and value_map of ``ops.tree_attention``.
        redrafter_maps: tuple[Tensor | None, Tensor | None]
        # How many positions the layer looks back on, its own included; 0 for all.
        redrafter_window: int

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            output_scale: Tensor | None = None,
            output_block_scale: Tensor | None = None,
        ) -> Tensor:
            step: TreeStep | None = getattr(attn_metadata, STEP_ATTRIBUTE, None)
            if step is None or not step.covers_all:
                output = super().forward(
                    layer, query, key, value, kv_cache, attn_metadata, output,
                    output_scale, output_block_scale,
                )  # fmt: skip
            if step is not None:
                rows = output.view(output.shape[0], self.num_heads, self.head_size)
                self.attend_trees(step, query, rows, kv_cache, attn_metadata.block_table)
            return output

        def attend_trees(
            self, step: TreeStep, query: Tensor, rows: Tensor, kv_cache: Tensor, table: Tensor
        ) -> None:
            """Our rows of one layer, written into ``rows``."""
            attend(
                step, query, rows, *self.split_cache(kv_cache), table, self.scale,
                self.logits_soft_cap, *self.redrafter_maps, self.redrafter_window,
                getattr(self, "sinks", None),
            )  # fmt: skip

    return TreeAttention


def window_of(impl: Any) -> int:
    """What an implementation of vLLM's looks back on, its own position included; 0 for all."""
    given = getattr(impl, "sliding_window", None)
    # FlashAttention's is how many keys it sees to the left and to the right.
    left = given[0] + 1 if isinstance(given, tuple) else given
    return left if left is not None and left > 0 else 0


def take_over(
    members: dict[str, Any],
    attention: type,
    key_map: Tensor | None = None,
    value_map: Tensor | None = None,
) -> MoveKV:
    """Give the layers of one KV cache group our attention; returns what moves their tokens.

    Args:
        members: layers by name, caches bound.
        attention: from ``with_trees``.
        key_map, value_map: see ``ops.tree_attention``.
    """
    for layer in members.values():
        layer.impl.__class__ = attention
        layer.impl.redrafter_maps = key_map, value_map
        layer.impl.redrafter_window = window_of(layer.impl)
    # Layers that share a cache must have it moved once.
    caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in members.values()}
    halves = [attention.split_cache(cache) for cache in caches.values()]
    return MoveKV([key for key, _ in halves], [value for _, value in halves], key_map, value_map)
