# SPDX-License-Identifier: Apache-2.0
"""Which path of a tree the target agrees with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.tree.tree import Tree

# Fills the columns of ``Walk.path`` behind the last accepted node.
NO_NODE = -1


@dataclass(frozen=True)
class Walk:
    """The accepted path of every tree.

    Attributes:
        path: ``[B, D]`` int64, node indices of the accepted drafted tokens in order, the root not
            among them; -1 behind the last one. D is the deepest tree's depth.
        num_accepted: ``[B]`` int64, accepted drafted tokens (0 to D).
        last_node: ``[B]`` int64, the node whose logits and hidden state feed the next step; the
            root (0) when nothing was accepted.
        next_token: ``[B]`` int64, the target's token at ``last_node``.
    """

    path: Tensor
    num_accepted: Tensor
    last_node: Tensor
    next_token: Tensor


def walk_greedy(tree: Tree, target_tokens: Tensor) -> Walk:
    """Follow the target's own token from the root until no child holds it.

    With ``target_tokens`` the argmax of every node's logits this is greedy verification (Apple's
    ``_greedy_choose_from_candidates``); with one exact draw of the target's law per node it is
    exact sampling: the token emitted at each node is the target's own, whatever was drafted.

    Args:
        tree: siblings hold distinct tokens.
        target_tokens: ``[B, M]`` int64, the target's token at each node; padding is not read.
    """
    batch = tree.tokens.shape[0]
    depth = int(tree.depths.max()) if tree.depths.numel() else 0
    path = torch.full((batch, depth), NO_NODE, dtype=torch.int64)
    last = torch.zeros(batch, dtype=torch.int64)
    accepted = torch.zeros(batch, dtype=torch.int64)
    for b in range(batch):
        count = int(tree.num_nodes[b])
        nodes = walk_one(
            tree.tokens[b, :count].tolist(),
            tree.parents[b, :count].tolist(),
            target_tokens[b, :count].tolist(),
        )
        accepted[b] = len(nodes)
        if nodes:
            path[b, : len(nodes)] = torch.tensor(nodes)
            last[b] = nodes[-1]
    next_token = target_tokens.gather(1, last[:, None]).squeeze(1)
    return Walk(path=path, num_accepted=accepted, last_node=last, next_token=next_token)


def walk_one(tokens: list[int], parents: list[int], target_tokens: list[int]) -> list[int]:
    """The accepted nodes of one tree, from lists; parents come first, so one pass is enough."""
    path: list[int] = []
    at = 0
    for node in range(1, len(tokens)):
        if parents[node] == at and tokens[node] == target_tokens[at]:
            path.append(node)
            at = node
    return path
