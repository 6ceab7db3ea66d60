# SPDX-License-Identifier: Apache-2.0
"""The prefix tree that the target verifies in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Parent of the root, and of padding columns.
NO_PARENT = -1

MASK_WORD_BITS = 64


@dataclass(frozen=True)
class Tree:
    """Prefix trees of a batch, padded to the largest one.

    Node 0 is the root, the known token. Nodes are in topological order with the best chain first:
    the first k nodes are a valid tree for every k >= 1. Columns past ``num_nodes`` are padding
    (token 0, parent -1, depth 0) and mean nothing.

    Attributes:
        tokens: ``[B, M]`` int64.
        parents: ``[B, M]`` int64, the parent's node index; -1 for the root.
        depths: ``[B, M]`` int64, 0 for the root.
        num_nodes: ``[B]`` int64, counting the root.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    num_nodes: Tensor

    @classmethod
    def from_lists(cls, tokens: list[list[int]], parents: list[list[int]]) -> Tree:
        """Trees from ragged lists, root included; parents must precede their children.

        Raises:
            ValueError: an empty tree, lists of different lengths, or a node before its parent.
        """
        for row_tokens, row_parents in zip(tokens, parents, strict=True):
            if not row_tokens or len(row_tokens) != len(row_parents):
                raise ValueError(
                    f"A tree needs as many parents as tokens and at least the root, got "
                    f"{len(row_tokens)} tokens and {len(row_parents)} parents."
                )
            for node, parent in enumerate(row_parents):
                if not (NO_PARENT if node == 0 else 0) <= parent < max(node, 0):
                    raise ValueError(
                        f"Node {node} has parent {parent}; node 0 needs parent -1 and every other "
                        "node a parent before itself."
                    )
        size = max((len(row) for row in tokens), default=1)
        shape = (len(tokens), size)
        out = cls(
            tokens=torch.zeros(shape, dtype=torch.int64),
            parents=torch.full(shape, NO_PARENT, dtype=torch.int64),
            depths=torch.zeros(shape, dtype=torch.int64),
            num_nodes=torch.tensor([len(row) for row in tokens], dtype=torch.int64),
        )
        for b, (row_tokens, row_parents) in enumerate(zip(tokens, parents, strict=True)):
            depths: list[int] = []
            for parent in row_parents:
                depths.append(0 if parent == NO_PARENT else depths[parent] + 1)
            out.tokens[b, : len(row_tokens)] = torch.tensor(row_tokens)
            out.parents[b, : len(row_tokens)] = torch.tensor(row_parents)
            out.depths[b, : len(row_tokens)] = torch.tensor(depths)
        return out

    @property
    def max_nodes(self) -> int:
        return self.tokens.shape[1]

    def positions(self, context_lens: Tensor) -> Tensor:
        """Position ids ``[B, M]``: tokens before the root (``context_lens`` ``[B]``) + depth."""
        return context_lens[:, None] + self.depths

    def ancestor_mask(self) -> Tensor:
        """``[B, M, M]`` bool: row i may see column j iff j is i or an ancestor of i.

        Every node also sees the whole context, which is not part of this mask. A padding row sees
        itself alone.
        """
        batch, size = self.tokens.shape
        mask = torch.eye(size, dtype=torch.bool).repeat(batch, 1, 1)
        for b in range(batch):
            for node in range(1, int(self.num_nodes[b])):
                mask[b, node] |= mask[b, int(self.parents[b, node])]
        return mask

    def packed_mask(self) -> Tensor:
        """``ancestor_mask`` as bits: ``[B, M, ceil(M / 64)]`` int64, bit j % 64 of word j // 64."""
        return pack_bits(self.ancestor_mask())


def mask_words(columns: int) -> int:
    """64-bit words that hold one row of a mask of that many columns."""
    return -(-columns // MASK_WORD_BITS)


def pack_bits(mask: Tensor) -> Tensor:
    """``[..., M]`` bool to ``[..., ceil(M / 64)]`` int64, bit j % 64 of word j // 64."""
    size = mask.shape[-1]
    words = mask_words(size)
    padded = torch.zeros(*mask.shape[:-1], words * MASK_WORD_BITS, dtype=torch.int64)
    padded[..., :size] = mask
    # Bit 63 is the sign: shifting 1 into it wraps, and the sum over distinct bits is exact.
    bits = torch.ones(MASK_WORD_BITS, dtype=torch.int64) << torch.arange(MASK_WORD_BITS)
    return (padded.unflatten(-1, (words, MASK_WORD_BITS)) * bits).sum(-1)
