# SPDX-License-Identifier: Apache-2.0
"""CUDA attention for steps that hold trees: our op over FlashAttention's paged cache.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_redrafter.engine.checks import check_layers
from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep, attend
from vllm_redrafter.ops.move_kv import MoveKV


class TreeFlashAttentionImpl(FlashAttentionImpl):
    """vLLM's FlashAttention, and ours for the rows of trees.

    Instances are never built: layers of our own engine are given this class.
    """

    def forward(
        self,
        layer: torch.nn.Module,
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
            key_cache, value_cache = split_cache(kv_cache)
            attend(
                step,
                query,
                output.view(output.shape[0], self.num_heads, self.head_size),
                key_cache,
                value_cache,
                attn_metadata.block_table,
                self.scale,
                self.logits_soft_cap,
            )
        return output


ADOPTABLE = (FlashAttentionImpl, TreeFlashAttentionImpl)


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of K and V, ``[blocks, kv_heads, block_size, head_dim]``.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, any strides.
    """
    key, value = kv_cache.chunk(2, dim=-1)
    return key, value


def take_over(members: dict[str, Any]) -> MoveKV:
    """See ``vllm_redrafter.engine.v2.attention.take_over``."""
    check_layers(members, ADOPTABLE)
    for layer in members.values():
        layer.impl.__class__ = TreeFlashAttentionImpl
    # Layers that share a cache must have it moved once.
    caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in members.values()}
    halves = [split_cache(cache) for cache in caches.values()]
    return MoveKV([key for key, _ in halves], [value for _, value in halves])
