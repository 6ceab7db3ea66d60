# SPDX-License-Identifier: Apache-2.0
"""The references of merging and choosing: written examples, and brute force over all trees."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.tree.candidates import (
    Candidates,
    best_chains,
    choose_tree,
    merge_candidates,
)


def beams_of(tokens: list, parents: list, scores: list) -> Beams:
    """One request's."""
    return Beams(
        torch.tensor([1]), torch.tensor([tokens]), torch.tensor([parents]), torch.tensor([scores])
    )


def chains_of(tokens: list, scores: list) -> Chains:
    """One request's."""
    matched = torch.ones(1, len(tokens), dtype=torch.int64)
    return Chains(torch.tensor([tokens]), matched, torch.tensor([scores]))


ROOT = torch.tensor([1])
# 10, 20 and below them 11, 12 (both of 10).
BEAMS = beams_of([[10, 20], [11, 12]], [[0, 0], [0, 0]], [[-1.0, -2.0], [-2.0, -3.0]])
# The lookup knows 10, 11, 13 and 30, 31.
CHAINS = chains_of([[10, 11, 13], [30, 31, 0]], [[-1.5, -1.75, -4.0], [-2.0, -2.5, FILLER_SCORE]])


def rows(found: Candidates) -> list[tuple]:
    count = int(found.counts[0])
    columns = (found.tokens, found.parents, found.depths, found.scores, found.sources)
    return list(zip(*(column[0, :count].tolist() for column in columns), strict=True))


def test_both_sources_in_one_tree():
    assert rows(merge_candidates(ROOT, BEAMS, CHAINS, 9)) == [
        (10, -1, 1, -1.0, 3),  # both know it: the higher score
        (11, 0, 2, -1.75, 3),  # here the lookup's
        (20, -1, 1, -2.0, 1),  # a tie: the drafter's comes first
        (30, -1, 1, -2.0, 2),
        (31, 3, 2, -2.5, 2),
        (12, 0, 2, -3.0, 1),
        (13, 1, 3, -4.0, 2),
    ]


def test_padding():
    found = merge_candidates(ROOT, BEAMS, CHAINS, 9)
    assert found.tokens[0, 7:].tolist() == [0, 0] and found.parents[0, 7:].tolist() == [-1, -1]
    assert found.depths[0, 7:].tolist() == [0, 0] and found.sources[0, 7:].tolist() == [0, 0]
    assert found.scores[0, 7:].tolist() == [FILLER_SCORE] * 2


def test_one_source_or_none():
    assert [row[0] for row in rows(merge_candidates(ROOT, BEAMS, None, 9))] == [10, 20, 11, 12]
    assert [row[0] for row in rows(merge_candidates(ROOT, None, CHAINS, 9))] == [
        10, 11, 30, 31, 13,
    ]  # fmt: skip
    assert rows(merge_candidates(ROOT, None, None, 9)) == []


def test_most_and_max_depth():
    for most in range(8):
        found = rows(merge_candidates(ROOT, BEAMS, CHAINS, most))
        assert found == rows(merge_candidates(ROOT, BEAMS, CHAINS, 9))[:most]
    shallow = rows(merge_candidates(ROOT, BEAMS, CHAINS, 9, torch.tensor([1])))
    assert [row[0] for row in shallow] == [10, 20, 30]
    assert rows(merge_candidates(ROOT, BEAMS, CHAINS, 9, torch.tensor([0]))) == []
    with pytest.raises(ValueError, match="most is -1"):
        merge_candidates(ROOT, BEAMS, CHAINS, -1)


def test_a_tie_goes_to_the_lower_depth():
    chains = chains_of([[5, 6], [7, 8]], [[-1.0, -1.0], [-1.0, -2.0]])
    assert [row[0] for row in rows(merge_candidates(ROOT, None, chains, 4))] == [5, 7, 6, 8]


def test_the_best_chain_comes_first():
    candidates = merge_candidates(ROOT, BEAMS, CHAINS, 9)
    tree, chosen = choose_tree(candidates, torch.tensor([5]))
    assert tree.num_nodes.tolist() == [6]
    assert tree.tokens[0, :6].tolist() == [1, 10, 11, 20, 30, 31]
    assert tree.parents[0, :6].tolist() == [-1, 0, 1, 0, 0, 4]
    assert chosen.tolist() == [[-1, 0, 1, 2, 3, 4, -1, -1, -1, -1]]
    tree, chosen = choose_tree(candidates, torch.tensor([100]))
    assert tree.tokens.tolist() == [[1, 10, 11, 13, 20, 30, 31, 12, 0, 0]]
    assert tree.depths.tolist() == [[0, 1, 2, 3, 1, 1, 2, 2, 0, 0]]
    assert chosen.tolist() == [[-1, 0, 1, 6, 2, 3, 4, 5, -1, -1]]
    tree, chosen = choose_tree(candidates, torch.tensor([0]))
    assert tree.num_nodes.tolist() == [1] and tree.tokens.sum() == 1 and (chosen == -1).all()


def test_the_best_chains_alone():
    """Among all paths: the first four nodes of the tree hold two of the chain's three."""
    found = best_chains(merge_candidates(ROOT, BEAMS, CHAINS, 9), 5)
    assert rows(found) == [(10, -1, 1, -1.0, 3), (11, 0, 2, -1.75, 3), (13, 1, 3, -4.0, 2)]
    assert found.tokens[0, 3:].tolist() == [0, 0] and found.parents[0, 3:].tolist() == [-1, -1]
    assert found.scores[0, 3:].tolist() == [FILLER_SCORE] * 2
    assert rows(best_chains(merge_candidates(ROOT, BEAMS, CHAINS, 9), 2)) == rows(found)[:2]
    narrow = best_chains(merge_candidates(ROOT, BEAMS, CHAINS, 4), 5)
    assert rows(narrow) == rows(found)[:2]
    tree, _ = choose_tree(found, torch.tensor([3]))
    assert tree.parents.tolist() == [[-1, 0, 1, 2, -1, -1]]


def test_chains_where_nothing_was_drafted():
    found = best_chains(merge_candidates(ROOT, None, None, 4), 3)
    assert found.counts.tolist() == [0] and found.tokens.shape == (1, 3)


def random_paths(seed: int) -> tuple[Beams, Chains]:
    """Few tokens, so that the sources meet; 5 + 6 paths at most."""
    generator = torch.Generator().manual_seed(seed)

    def losses(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2

    first = -losses(2).sort().values
    parents = torch.randint(2, (3,), generator=generator)
    tokens = torch.tensor([[0, 1, 2], [0, 1, 2]])
    above = torch.cat([first, torch.tensor([FILLER_SCORE])])
    scores = torch.stack([above, above[parents] - losses(3)])
    beams = beams_of(tokens.tolist(), [[0, 0, 0], parents.tolist()], scores.tolist())
    rows = torch.randint(3, (2, 3), generator=generator)
    return beams, chains_of(rows.tolist(), (-losses(2, 3).cumsum(-1)).tolist())


@pytest.mark.parametrize("seed", range(12))
def test_no_other_tree_of_as_many_nodes_is_likelier(seed):
    beams, chains = random_paths(seed)
    found = rows(merge_candidates(ROOT, beams, chains, 11))
    parents = [row[1] for row in found]
    chance = [math.exp(row[3]) for row in found]
    for size in range(len(found) + 1):
        # Sets that hold every member's parent are all the trees there are.
        trees = [
            nodes
            for nodes in itertools.combinations(range(len(found)), size)
            if all(parents[node] == -1 or parents[node] in nodes for node in nodes)
        ]
        most = max(sum(chance[node] for node in nodes) for nodes in trees)
        assert tuple(range(size)) in trees
        assert sum(chance[:size]) == pytest.approx(most, abs=1e-12)
