# SPDX-License-Identifier: Apache-2.0
"""What follows from the target's token at every row: the accepted paths, and which KV moves.

Operators on tensors of fixed shapes that read nothing back, so that a CUDA graph can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_redrafter.engine.v2.tree_store import TreeStore
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import Walk

# Every tensor of a walk; all have a row per request.
WALK_FIELDS = tuple(field.name for field in fields(Walk))


@dataclass(frozen=True)
class Accepted:
    """Of B requests.

    Attributes:
        walk: the accepted paths, D columns, the deepest node that a tree can have.
        emitted: ``[B, N + 1]`` int64, the tokens that are said; 0 behind the last.
        num_nodes: ``[B]`` int64, nodes that were verified, counting the root.
    """

    walk: Walk
    emitted: Tensor
    num_nodes: Tensor


def accept(
    trees: TreeStore, slots: Tensor, tokens: Tensor, drawn: Tensor, first: Tensor, scheduled: Tensor
) -> Accepted:
    """Walk through the trees of B requests along the target's tokens.

    Args:
        trees: the topology of all requests.
        slots: ``[B]`` integers, request slots.
        tokens: ``[rows]`` integers, the token that each row was computed from.
        drawn: ``[rows]`` int64, the target's token at every row.
        first: ``[B]`` int64, row of every request's root; its nodes follow it.
        scheduled: ``[B]`` int64, at least 1, how many of a request's nodes have rows: the scheduler
            may have cut a draft to its first nodes, which are a tree of their own.
    """
    num_nodes = trees.num_nodes[slots].minimum(scheduled)
    at = (first[:, None] + trees.columns).clamp_(max=drawn.shape[0] - 1)
    tree = Tree(tokens[at].long(), trees.parents[slots], trees.depths[slots], num_nodes)
    drawn = drawn[at]
    found = walk(tree, drawn, max_depth=trees.depth)
    said = drawn.gather(1, path_nodes(found))
    found = trees.endings.cut(slots, found, said)
    said = torch.where(trees.columns[: trees.depth + 1] <= found.num_accepted[:, None], said, 0)
    # vLLM wants a column per row of the widest tree.
    emitted = pad(said, (0, trees.nodes - trees.depth))
    return Accepted(found, emitted, num_nodes)


def path_nodes(found: Walk) -> Tensor:
    """``[B, D + 1]`` int64: the root, then the accepted nodes; 0 behind the last."""
    root = torch.zeros_like(found.last_node)[:, None]
    return torch.cat([root, found.path.clamp(min=0)], 1)


def kv_moves(path: Tensor, root_rows: Tensor, row_slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From where to where the accepted path's KV moves, to lie behind its root.

    Args:
        path: ``[B, D]`` int64, as ``Walk.path``.
        root_rows: ``[B]`` int64, the row of every request's root; its nodes follow it.
        row_slots: ``[groups, rows]`` integers, where the rows are in each KV cache group.

    Returns:
        ``[groups, B * D]`` int64 slots for ``MoveKV``, sources and destinations, -1 where nothing
        moves; and ``[B, D]`` bool, what moves.
    """
    depth = torch.arange(1, path.shape[1] + 1, device=path.device)
    moved = (path > 0) & (path != depth)
    root, last = root_rows[:, None], row_slots.shape[1] - 1
    source = (root + path).clamp_(min=0, max=last).flatten()
    target = (root + depth).clamp_(max=last).flatten()
    keep, slots = moved.flatten(), row_slots.long()
    return torch.where(keep, slots[:, source], -1), torch.where(keep, slots[:, target], -1), moved
