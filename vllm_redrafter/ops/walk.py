# SPDX-License-Identifier: Apache-2.0
"""Greedy verification of a batch of trees, on the device that the trees are on."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.ops import reference
from vllm_redrafter.ops.library import compiled_available, has_kernel
from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import Walk


def walk(tree: Tree, target_tokens: Tensor, max_depth: int | None = None) -> Walk:
    """``vllm_redrafter.tree.walk.walk_greedy`` in one compiled call.

    On CUDA nothing is read back, so the call can be captured in a CUDA graph.

    Args:
        tree: on any device, rows of any stride. A ``num_nodes`` above M counts as M; one of 0 is
            the root alone.
        target_tokens: ``[B, M]`` int64 on that device, the target's token at each node; padding
            has no influence.
        max_depth: columns D of ``Walk.path``. A longer path is cut there: D tokens are accepted,
            and ``next_token`` is the target's behind the last of them. None: the deepest tree's
            depth on the CPU, M - 1 on CUDA, where the host cannot know it.

    Returns:
        ``Walk``, on the same device.

    Raises:
        ValueError: ``max_depth`` below 0.
        RuntimeError: dtypes or shapes that do not fit (compiled operator).
    """
    tokens, device = tree.tokens, tree.tokens.device
    batch, columns = tokens.shape
    if max_depth is None:
        if device.type == "cpu":
            max_depth = int(tree.depths.max()) if tree.depths.numel() else 0
        else:
            max_depth = columns - 1
    elif max_depth < 0:
        raise ValueError(f"max_depth is {max_depth}; it must be 0 or more.")
    path = torch.empty(batch, max_depth, dtype=torch.int64, device=device)
    num_accepted, last_node, next_token = torch.empty(3, batch, dtype=torch.int64, device=device)
    compiled = has_kernel(device)
    operator = torch.ops.redrafter.walk.default if compiled else reference.walk
    operator(
        path, num_accepted, last_node, next_token,
        tokens, tree.parents, tree.num_nodes, target_tokens,
    )  # fmt: skip
    return Walk(path=path, num_accepted=num_accepted, last_node=last_node, next_token=next_token)


if compiled_available():

    @torch.library.register_fake("redrafter::walk")
    def _(path: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""
