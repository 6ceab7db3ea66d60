# SPDX-License-Identifier: Apache-2.0
"""Which attention the target's layers get, by device."""

from __future__ import annotations

from typing import Any

import torch

from vllm_redrafter.ops.move_kv import MoveKV


def take_over(members: dict[str, Any], device: torch.device) -> MoveKV:
    """Give the layers of one KV cache group our attention; returns what moves their tokens.

    Args:
        members: layers by name, caches bound.
        device: where they are.

    Raises:
        UnsupportedError: a layer that we cannot compute.
    """
    # Imported here: each needs a backend that the other's installation may lack.
    if device.type == "cpu":
        from vllm_redrafter.engine import cpu_attention as backend
    else:
        from vllm_redrafter.engine.v2 import cuda_attention as backend
    return backend.take_over(members)
