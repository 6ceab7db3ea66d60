# SPDX-License-Identifier: Apache-2.0
"""The tree of one request, as plain lists: what the worker remembers between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RequestTree:
    """One request's drafted nodes; node 0, the root, is the known token and not stored.

    Attributes:
        tokens: token of node i + 1.
        parents: parent node of node i + 1 (0 is the root).
        depths: int64 ``[n]``, depth of node i + 1.
        masks: int64 ``[n + 1, words]``, ancestor-or-self bits of every node, the root first.
        probabilities: float32 ``[n]``, of node i + 1 to be accepted; None where nobody said.
        sources: int64 ``[n]``, who drafted node i + 1 (``tree.candidates``); None as above.
    """

    tokens: list[int]
    parents: list[int]
    depths: np.ndarray
    masks: np.ndarray
    probabilities: np.ndarray | None = None
    sources: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def chain_length(self) -> int:
        """How many leading nodes form a chain: the best one, by the order of nodes."""
        length = 0
        while length < len(self.parents) and self.parents[length] == length:
            length += 1
        return length

    @property
    def is_chain(self) -> bool:
        return self.chain_length == len(self.tokens)

    def first(self, count: int) -> RequestTree:
        """The tree of the first ``count`` nodes; valid because parents come first."""
        if count >= len(self.tokens):
            return self
        return RequestTree(
            self.tokens[:count],
            self.parents[:count],
            self.depths[:count],
            self.masks[: count + 1],
            None if self.probabilities is None else self.probabilities[:count],
            None if self.sources is None else self.sources[:count],
        )

    def only(self, nodes: list[int]) -> RequestTree:
        """The tree of these nodes, in their order; with a node, the nodes above it."""
        if len(nodes) == len(self.tokens):
            return self
        place = {0: 0} | {node: at for at, node in enumerate(nodes, start=1)}
        parents = [place[self.parents[node - 1]] for node in nodes]
        index = np.array(nodes, dtype=np.int64) - 1
        sees = [1]
        for node, parent in enumerate(parents, start=1):
            sees.append(sees[parent] | 1 << node)
        words = mask_words(len(sees))
        bits = [[row >> 64 * word & 0xFFFF_FFFF_FFFF_FFFF for word in range(words)] for row in sees]
        return RequestTree(
            [self.tokens[node - 1] for node in nodes],
            parents,
            self.depths[index],
            np.array(bits, dtype=np.uint64).view(np.int64),
            None if self.probabilities is None else self.probabilities[index],
            None if self.sources is None else self.sources[index],
        )

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that holds ``token``, if there is one."""
        for index in range(node, len(self.parents)):
            if self.parents[index] == node and self.tokens[index] == token:
                return index + 1
        return None


def mask_words(rows: int) -> int:
    """How many 64-bit words hold one bit per row."""
    return -(-rows // 64)


def chain_masks(rows: int, words: int | None = None) -> np.ndarray:
    """Ancestor bits of a chain of ``rows`` rows: row i sees rows 0..i. int64 ``[rows, words]``."""
    words = words or mask_words(rows)
    masks = np.zeros((rows, words), dtype=np.uint64)
    for row in range(rows):
        full, rest = divmod(row + 1, 64)
        masks[row, :full] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        if rest:
            masks[row, full] = np.uint64((1 << rest) - 1)
    return masks.view(np.int64)


def chain(tokens: list[int]) -> RequestTree:
    """A chain of ``tokens``: what a request without a known topology is verified as."""
    count = len(tokens)
    return RequestTree(
        tokens=list(tokens),
        parents=list(range(count)),
        depths=np.arange(1, count + 1),
        masks=chain_masks(count + 1),
    )


# Nothing drafted: the root alone.
NOTHING = chain([])
