# SPDX-License-Identifier: Apache-2.0
"""Random drafts of both sources that share paths, and what every list and tree of them must be."""

from __future__ import annotations

import torch
from torch import Tensor
from tree_cases import random_beams

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.tree.candidates import Candidates
from vllm_redrafter.tree.tree import Tree


def random_chains(
    batch: int, chains: int, depth: int, vocab: int, *, seed: int, step: float = 0.0,
    beams: Beams | None = None,
) -> Chains:  # fmt: skip
    """Chains as a lookup leaves them: equal starts have equal scores, some requests have fewer.

    With ``beams`` every other chain starts as one of them. A ``step`` rounds scores to its
    multiples, so that they tie, also with those of beams.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (batch, chains, depth), generator=generator)
    scores = torch.full((batch, chains, depth), FILLER_SCORE)
    found = torch.randint(chains + 1, (batch,), generator=generator) if chains else []
    if beams is not None and chains:
        paths = beams.sequences()[:, :, 1:]
        for c in range(0, chains, 2):
            shared = min(depth, paths.shape[2])
            tokens[:, c, :shared] = paths[:, c % paths.shape[1], :shared]
    for b in range(batch):
        known: dict[tuple[int, ...], float] = {(): 0.0}
        for c in range(int(found[b]) if chains else 0):
            row = tuple(tokens[b, c].tolist())
            for d in range(depth):
                loss = float(torch.rand((), generator=generator)) * 2
                loss = round(loss / step) * step if step else loss
                scores[b, c, d] = known.setdefault(row[: d + 1], known[row[:d]] - loss)
    for b in range(batch):
        tokens[b, int(found[b]) if chains else 0 :] = 0
    matched = torch.zeros(batch, chains, dtype=torch.int64)
    return Chains(tokens, matched, scores)


def random_drafts(
    seed: int, batch: int, length: int, width: int, chains: int, depth: int, vocab: int,
    step: float = 0.0,
) -> tuple[Tensor, Beams | None, Chains | None]:  # fmt: skip
    """(root, beams, chains); a width or a number of chains of 0 is no such source at all."""
    root = torch.arange(batch) + 100
    beams = random_beams(batch, length, width, vocab, seed=seed, step=step) if width else None
    if not chains:
        return root, beams, None
    return root, beams, random_chains(
        batch, chains, depth, vocab, seed=seed + 1, step=step, beams=beams
    )


def assert_are_candidates(found: Candidates) -> None:
    """Parents first, scores that never rise, distinct paths, padding as documented."""
    for b, count in enumerate(found.counts.tolist()):
        parents, depths = found.parents[b].tolist(), found.depths[b].tolist()
        tokens, scores = found.tokens[b].tolist(), found.scores[b].tolist()
        assert 0 <= count <= len(parents)
        for i in range(count):
            assert -1 <= parents[i] < i
            assert depths[i] == 1 + (depths[parents[i]] if parents[i] >= 0 else 0)
            assert i == 0 or scores[i] <= scores[i - 1]
        assert len(set(zip(parents[:count], tokens[:count], strict=True))) == count
        assert all(source in (1, 2, 3) for source in found.sources[b, :count].tolist())
        for name, value in {"tokens": 0, "parents": -1, "depths": 0, "sources": 0}.items():
            assert (getattr(found, name)[b, count:] == value).all()
        assert (found.scores[b, count:] == FILLER_SCORE).all()


def assert_are_trees(tree: Tree, masks: Tensor, chosen: Tensor) -> None:
    """Topological, so that every first nodes are a tree; siblings distinct; masks of parents."""
    assert torch.equal(masks, tree.packed_mask())
    for b, count in enumerate(tree.num_nodes.tolist()):
        parents, depths = tree.parents[b].tolist(), tree.depths[b].tolist()
        tokens = tree.tokens[b].tolist()
        assert 1 <= count <= len(parents) and parents[0] == -1 and depths[0] == 0
        for node in range(1, count):
            assert 0 <= parents[node] < node and depths[node] == depths[parents[node]] + 1
        assert len(set(zip(parents[1:count], tokens[1:count], strict=True))) == count - 1
        assert sorted(chosen[b, 1:count].tolist()) == sorted(set(chosen[b, 1:count].tolist()))
        assert chosen[b, 0] == -1 and (chosen[b, count:] == -1).all()
        assert not any(tokens[count:] + depths[count:])
        assert all(parent == -1 for parent in parents[count:])
        # The best chain: from the root always to the likeliest child, so long as there is one.
        node = 0
        while node in parents[1:count]:
            children = [i for i in range(1, count) if parents[i] == node]
            assert min(children, key=lambda i: int(chosen[b, i])) == node + 1
            node += 1
