# SPDX-License-Identifier: Apache-2.0
"""CPU attention for steps that hold trees: our op over vLLM's paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_redrafter.engine.v1.kv_layout import KVLayout, split_cache
from vllm_redrafter.ops.tree_attention import tree_attention

# Attribute under which the runner hangs a TreeStep on vLLM's attention metadata.
STEP_ATTRIBUTE = "redrafter_step"


@dataclass(frozen=True)
class TreeStep:
    """Which rows of one step our op computes.

    Attributes:
        request_index: int32 ``[R]``, row of the block table of each covered request.
        row_start: int32 ``[R]``, its first query row, the root.
        row_count: int32 ``[R]``, its query rows.
        context_lens: int32 ``[R]``, its cached tokens before the root.
        masks: int64 ``[T, words]``, which of its request's rows a row sees.
        covers_all: no other rows are in this step, so vLLM's own kernel is not needed.
    """

    request_index: Tensor
    row_start: Tensor
    row_count: Tensor
    context_lens: Tensor
    masks: Tensor
    covers_all: bool


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
            tree_attention(
                output.view(output.shape[0], self.num_heads, self.head_size),
                query,
                key_cache,
                value_cache,
                layout.key_map,
                layout.value_map,
                attn_metadata.block_table,
                step.request_index,
                step.row_start,
                step.row_count,
                step.context_lens,
                step.masks,
                self.scale,
                float(self.logits_soft_cap),
            )
        return output


# Exactly these: a subclass that we do not know may keep its cache differently.
ADOPTABLE = (CPUAttentionBackendImpl, TreeCPUAttentionImpl)


def adopt(layer: torch.nn.Module, layout: KVLayout) -> None:
    """Give ``layer`` our attention; the class of its ``impl`` must be in ADOPTABLE."""
    layer.impl.__class__ = TreeCPUAttentionImpl
    layer.impl.redrafter_layout = layout
