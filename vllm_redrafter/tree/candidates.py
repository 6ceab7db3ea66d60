# SPDX-License-Identifier: Apache-2.0
"""Every path that was drafted for a request, whoever drafted it, likeliest first.

Beams of a drafter and continuations from the request's own text are inserted in one prefix tree.
Equal paths are one candidate, with the higher of their probabilities. The first k candidates are
a tree for every k, and of all trees of k nodes the one with the most expected tokens: so a budget
of nodes is only a number per request (``vllm_redrafter.budget``).

These loops are the definition; ``vllm_redrafter.ops.candidates`` is the compiled form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.tree.build import LOWEST_REAL_SCORE, best_chain
from vllm_redrafter.tree.tree import NO_PARENT, Tree

# Who drafted a candidate; a sum where several did.
FROM_DRAFTER = 1
FROM_LOOKUP = 2
SOURCE_NAMES = {FROM_DRAFTER: "drafter", FROM_LOOKUP: "lookup", FROM_DRAFTER | FROM_LOOKUP: "both"}
# A request's grammar alone: what it forces or leaves. On Model Runner V1, beside those above.
FROM_GRAMMAR = 4
ALL_SOURCE_NAMES = SOURCE_NAMES | {FROM_GRAMMAR: "grammar"}


@dataclass(frozen=True)
class Candidates:
    """Candidates of a batch, padded to M columns; a parent comes before its children.

    Attributes:
        root: ``[B]`` int64, the known token.
        tokens: ``[B, M]`` int64; 0 in padding.
        parents: ``[B, M]`` int64, the candidate's parent among these; -1 for children of the root
            and in padding.
        depths: ``[B, M]`` int64, 1 for children of the root; 0 in padding.
        scores: ``[B, M]`` float32, log-probability of the path, never rising along a row;
            ``FILLER_SCORE`` in padding.
        sources: ``[B, M]`` int64, FROM_DRAFTER, FROM_LOOKUP or their sum; 0 in padding
            (or FROM_GRAMMAR, on Model Runner V1).
        counts: ``[B]`` int64, how many are real.
    """

    root: Tensor
    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    sources: Tensor
    counts: Tensor


def merge_candidates(
    root: Tensor,
    beams: Beams | None,
    chains: Chains | None,
    most: int,
    max_depth: Tensor | None = None,
) -> Candidates:
    """The ``most`` likeliest paths of each request.

    Of equal scores the lower depth comes first, then the drafter's in the order of ranks, then the
    lookup's in the order of chains.

    Args:
        root: ``[B]`` int64, the known tokens, on the CPU.
        beams: the drafter's; None for none.
        chains: the lookup's; None for none.
        most: M >= 0 columns.
        max_depth: ``[B]`` int64, deeper paths are left out; None for no limit.

    Raises:
        ValueError: ``most`` below 0.
    """
    if most < 0:
        raise ValueError(f"most is {most}; it must be 0 or more.")
    batch = root.shape[0]
    out = Candidates(
        root=root,
        tokens=torch.zeros(batch, most, dtype=torch.int64),
        parents=torch.full((batch, most), NO_PARENT, dtype=torch.int64),
        depths=torch.zeros(batch, most, dtype=torch.int64),
        scores=torch.full((batch, most), FILLER_SCORE),
        sources=torch.zeros(batch, most, dtype=torch.int64),
        counts=torch.zeros(batch, dtype=torch.int64),
    )
    for b in range(batch):
        limit = None if max_depth is None else int(max_depth[b])
        found: dict[tuple[int, ...], tuple[float, int]] = {}
        for path, score, source in (*_beam_paths(beams, b), *_chain_paths(chains, b)):
            if score > LOWEST_REAL_SCORE and (limit is None or len(path) <= limit):
                other, sources = found.get(path, (score, 0))
                found[path] = max(score, other), sources | source
        # A stable sort: what is equal keeps the order of insertion.
        order = sorted(found, key=lambda path: (-found[path][0], len(path)))[:most]
        place = {path: i for i, path in enumerate(order)}
        for i, path in enumerate(order):
            out.tokens[b, i] = path[-1]
            out.parents[b, i] = place[path[:-1]] if len(path) > 1 else NO_PARENT
            out.depths[b, i] = len(path)
            out.scores[b, i], out.sources[b, i] = found[path]
        out.counts[b] = len(order)
    return out


def best_chains(candidates: Candidates, most: int) -> Candidates:
    """Each request's best chain alone: from the root always the likeliest child.

    Args:
        candidates: of M columns, on the CPU.
        most: K >= 0, the longest that a chain may be.

    Returns:
        Candidates of K columns; a chain is likeliest first as it is.
    """
    batch, columns = candidates.tokens.shape
    picked = torch.full((batch, most), columns)
    for b in range(batch):
        above = [None if p == NO_PARENT else p for p in candidates.parents[b].tolist()]
        chain = best_chain(list(range(int(candidates.counts[b]))), above)[:most]
        picked[b, : len(chain)] = torch.tensor(chain, dtype=torch.int64)
    real = picked < columns
    along = torch.arange(most).expand(batch, most)

    def taken(values: Tensor, padding: float) -> Tensor:
        wide = torch.nn.functional.pad(values, (0, 1), value=padding)
        return wide.gather(1, picked)

    return Candidates(
        root=candidates.root,
        tokens=taken(candidates.tokens, 0),
        parents=torch.where(real, along - 1, NO_PARENT),
        depths=torch.where(real, along + 1, 0),
        scores=taken(candidates.scores, FILLER_SCORE),
        sources=taken(candidates.sources, 0),
        counts=real.sum(1),
    )


def choose_tree(candidates: Candidates, counts: Tensor) -> tuple[Tree, Tensor]:
    """The trees of each request's first ``counts`` candidates, the best chain first.

    Args:
        candidates: on the CPU.
        counts: ``[B]`` int64, at least 0; a request has no more than it has candidates.

    Returns:
        tree: of M + 1 columns, node 0 the known token.
        chosen: ``[B, M + 1]`` int64, the candidate that every node was; -1 for root and padding.
    """
    batch, most = candidates.tokens.shape
    tree = Tree(
        tokens=torch.zeros(batch, most + 1, dtype=torch.int64),
        parents=torch.full((batch, most + 1), NO_PARENT, dtype=torch.int64),
        depths=torch.zeros(batch, most + 1, dtype=torch.int64),
        num_nodes=torch.ones(batch, dtype=torch.int64),
    )
    chosen = torch.full((batch, most + 1), -1, dtype=torch.int64)
    for b in range(batch):
        tree.tokens[b, 0] = candidates.root[b]
        count = min(int(counts[b]), int(candidates.counts[b]))
        above = [None if p == NO_PARENT else p for p in candidates.parents[b].tolist()]
        chain = best_chain(list(range(count)), above)
        order = chain + [i for i in range(count) if i not in set(chain)]
        node_of = {candidate: node for node, candidate in enumerate(order, start=1)}
        for candidate, node in node_of.items():
            parent = above[candidate]
            tree.tokens[b, node] = candidates.tokens[b, candidate]
            tree.parents[b, node] = 0 if parent is None else node_of[parent]
            tree.depths[b, node] = candidates.depths[b, candidate]
            chosen[b, node] = candidate
        tree.num_nodes[b] = 1 + count
    return tree, chosen


def _beam_paths(beams: Beams | None, b: int) -> list[tuple[tuple[int, ...], float, int]]:
    """(path, score, FROM_DRAFTER) of all that was kept, by depth and rank."""
    if beams is None:
        return []
    found: list[tuple[tuple[int, ...], float, int]] = []
    above: list[tuple[int, ...]] = []
    for depth in range(beams.draft_length):
        parents = beams.parents[b, depth].tolist()
        heads = [above[parent] if depth else () for parent in parents]
        tokens = beams.tokens[b, depth].tolist()
        above = [(*head, token) for head, token in zip(heads, tokens, strict=True)]
        scores = beams.scores[b, depth].tolist()
        found += [
            (path, score, FROM_DRAFTER) for path, score in zip(above, scores, strict=True)
        ]
    return found


def _chain_paths(chains: Chains | None, b: int) -> list[tuple[tuple[int, ...], float, int]]:
    """(path, score, FROM_LOOKUP) of every token, by chain and depth; equal paths may come twice."""
    if chains is None:
        return []
    found = []
    for tokens, scores in zip(chains.tokens[b].tolist(), chains.scores[b].tolist(), strict=True):
        found += [
            (tuple(tokens[: d + 1]), score, FROM_LOOKUP) for d, score in enumerate(scores)
        ]
    return found
