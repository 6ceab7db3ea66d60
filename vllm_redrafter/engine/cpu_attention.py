# SPDX-License-Identifier: Apache-2.0
"""CPU attention for steps that hold trees: our op over vLLM's paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_redrafter.engine.checks import check_layers
from vllm_redrafter.engine.kv_layout import KVLayout, probe_layout, split_cache
from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep, attend
from vllm_redrafter.ops.move_kv import MoveKV


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, and ours for the rows of trees.

    Instances are never built: the runner gives this class to the layers of its own engine (see
    ``adopt``), so that other engines in the process keep vLLM's.
    """

    redrafter_layout: KVLayout

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
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
            assert attn_metadata is not None
            key_cache, value_cache = split_cache(kv_cache)
            layout = self.redrafter_layout
            attend(
                step,
                query,
                output.view(output.shape[0], self.num_heads, self.head_size),
                key_cache,
                value_cache,
                attn_metadata.block_table,
                self.scale,
                self.logits_soft_cap,
                layout.key_map,
                layout.value_map,
            )
        return output


# Exactly these: a subclass that we do not know may keep its cache differently.
ADOPTABLE = (CPUAttentionBackendImpl, TreeCPUAttentionImpl)


def adopt(layer: torch.nn.Module, layout: KVLayout) -> None:
    """Give ``layer`` our attention; the class of its ``impl`` must be in ADOPTABLE."""
    layer.impl.__class__ = TreeCPUAttentionImpl
    layer.impl.redrafter_layout = layout


def take_over(members: dict[str, Any]) -> MoveKV:
    """Give the layers of one KV cache group our attention; returns what moves their tokens.

    Args:
        members: layers by name, caches bound.

    Raises:
        UnsupportedError: a layer that we cannot compute.
    """
    check_layers(members, ADOPTABLE)
    first = next(iter(members.values()))
    layout = probe_layout(first, first.kv_cache)
    for layer in members.values():
        adopt(layer, layout)
    # Layers that share a cache must have it moved once.
    caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in members.values()}
    halves = [split_cache(cache) for cache in caches.values()]
    return MoveKV(
        [key for key, _ in halves],
        [value for _, value in halves],
        layout.key_map,
        layout.value_map,
    )
