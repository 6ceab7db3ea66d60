# SPDX-License-Identifier: Apache-2.0
"""CUDA attention for steps that hold trees: our op over FlashAttention's paged cache.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_redrafter.engine import tree_attention
from vllm_redrafter.engine.checks import check_layers
from vllm_redrafter.ops.move_kv import MoveKV


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of K and V, ``[blocks, kv_heads, block_size, head_dim]``.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, any strides.
    """
    key, value = kv_cache.chunk(2, dim=-1)
    return key, value


TreeFlashAttentionImpl = tree_attention.with_trees(FlashAttentionImpl, split_cache)

# kMaxDim of csrc/cuda/tree_attention_kernel.cuh.
MOST_HEAD_SIZE = 256

ADOPTABLE = (FlashAttentionImpl, TreeFlashAttentionImpl)


def take_over(members: dict[str, Any]) -> MoveKV:
    """See ``vllm_redrafter.engine.v2.attention.take_over``."""
    check_layers(members, ADOPTABLE, MOST_HEAD_SIZE)
    return tree_attention.take_over(members, TreeFlashAttentionImpl)
