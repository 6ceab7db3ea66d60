# SPDX-License-Identifier: Apache-2.0
"""The trees of all running requests, on the device, by request slot.

Tokens of the drafted nodes live in vLLM's own ``draft_tokens``; this is the topology beside them.
Every slot holds N + 1 rows, the root first; rows behind ``num_nodes`` are padding that nobody sees
and no walk reaches. Nothing here reads a value back to the host.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_redrafter.engine.v2.endings import Endings
from vllm_redrafter.tree.tree import NO_PARENT, Tree, pack_bits


class Shape(enum.IntEnum):
    """The most that a request may have drafted."""

    NOTHING = 0
    CHAIN = 1
    TREE = 2


class Drafted(NamedTuple):
    """Trees of N + 1 columns, for B requests.

    Attributes:
        tree: the trees.
        masks: ``[B, N + 1, words]`` int64, ancestor-or-self bits of every node.
        sources: ``[B, N + 1]`` int64, who drafted every node; roots and padding mean nothing.
    """

    tree: Tree
    masks: Tensor
    sources: Tensor


class TreeStore:
    """Topology of R request slots with up to N drafted nodes each.

    Args:
        slots: R.
        nodes: N.
        depth: the deepest node that a tree can have.
        device: where.

    Attributes:
        parents: ``[R, N + 1]`` int64, -1 for the root and for padding.
        depths: ``[R, N + 1]`` int64, 0 for the root and for padding.
        masks: ``[R, N + 1, words]`` int64, ancestor-or-self bits of every node.
        sources: ``[R, N + 1]`` int64, who drafted every node (``tree.candidates``); 0 for the root
            and for padding.
        num_nodes: ``[R]`` int64, counting the root; 1 where nothing was drafted.
        shape: ``[R]`` int64, a ``Shape`` per slot.
        columns: ``[N + 1]`` int64, 0 to N.
        endings: where the requests end.
    """

    def __init__(self, slots: int, nodes: int, depth: int, device: torch.device) -> None:
        rows = nodes + 1
        self.nodes, self.depth = nodes, depth
        self.alone = pack_bits(torch.eye(rows, dtype=torch.bool)).to(device)
        self.parents = torch.full((slots, rows), NO_PARENT, dtype=torch.int64, device=device)
        self.depths, self.sources = torch.zeros(2, slots, rows, dtype=torch.int64, device=device)
        self.masks = self.alone.repeat(slots, 1, 1)
        self.num_nodes = torch.ones(slots, dtype=torch.int64, device=device)
        self.shape = torch.full((slots,), int(Shape.TREE), dtype=torch.int64, device=device)
        self.columns = torch.arange(rows, device=device)
        self.endings = Endings(slots, device)

    def reset(self, slot: int, shape: Shape) -> None:
        """A new request takes ``slot``; until it has drafted, its tree is the root alone."""
        self.parents[slot].fill_(NO_PARENT)
        self.depths[slot].zero_()
        self.sources[slot].zero_()
        self.masks[slot].copy_(self.alone)
        self.num_nodes[slot].fill_(1)
        self.shape[slot].fill_(int(shape))

    def limit(self, slot: int, shape: Shape) -> None:
        """No more than ``shape`` for the request that has taken ``slot``."""
        self.shape[slot].clamp_(max=int(shape))

    def clear(self, slots: Tensor) -> Tensor:
        """Nothing was drafted for requests ``slots``, ``[B]``; returns what ``put`` does."""
        self.parents[slots] = NO_PARENT
        self.depths[slots] = 0
        self.sources[slots] = 0
        self.masks[slots] = self.alone
        self.num_nodes[slots] = 1
        return self.columns.new_zeros(slots.shape[0], self.nodes)

    def put(self, slots: Tensor, drafted: Drafted, drafts: Tensor) -> Tensor:
        """Keep what was drafted, cut to what each request may have.

        Args:
            slots: ``[B]`` int64, request slots.
            drafted: trees of N + 1 columns.
            drafts: ``[B]`` bool, False for requests that have no known token yet.

        Returns:
            ``[B, N]`` int64, the tokens of the drafted nodes; 0 in padding.
        """
        tree, masks, sources = drafted
        parents, columns = tree.parents, self.columns
        shape = self.shape[slots]
        # Nodes are in topological order, best chain first: the leading nodes whose parent is the
        # node before them are that chain.
        in_chain = (parents[:, 1:] == columns[:-1]).long().cumprod(1)
        chain = (1 + in_chain.sum(1)).minimum(tree.num_nodes)
        count = torch.where(shape == int(Shape.CHAIN), chain, tree.num_nodes)
        count = torch.where(drafts & (shape != int(Shape.NOTHING)), count, 1)
        real = columns < count[:, None]
        self.parents[slots] = torch.where(real, parents, NO_PARENT)
        self.depths[slots] = torch.where(real, tree.depths, 0)
        self.sources[slots] = torch.where(real & (columns > 0), sources, 0)
        self.masks[slots] = torch.where(real[:, :, None], masks, self.alone)
        self.num_nodes[slots] = count
        return torch.where(real, tree.tokens, 0)[:, 1:]
