# SPDX-License-Identifier: Apache-2.0
"""CPU attention for steps that hold trees."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_redrafter.engine import tree_attention
from vllm_redrafter.engine.checks import check_layers
from vllm_redrafter.engine.kv_layout import probe_layout, split_cache
from vllm_redrafter.ops.move_kv import MoveKV

TreeCPUAttentionImpl = tree_attention.with_trees(CPUAttentionBackendImpl, split_cache)

# Exactly these: a subclass that we do not know may keep its cache differently.
ADOPTABLE = (CPUAttentionBackendImpl, TreeCPUAttentionImpl)


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
    return tree_attention.take_over(members, TreeCPUAttentionImpl, layout.key_map, layout.value_map)
