# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/synthetic.py: the walk accepts what it was told to, and nothing else changes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import walk_greedy

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"))
import synthetic  # noqa: E402

# Three levels; the root has three children, the best of them two, that one's best two.
PARENTS = [-1, 0, 0, 0, 1, 1, 4, 4]
VOCAB = 100


def decided(rates, ranks, requests=8, seed=1):
    """Accepted paths of many equal requests, tokens before and after."""
    columns = len(PARENTS)
    tokens = torch.arange(10, 10 + columns).repeat(requests, 1)
    parents = torch.tensor(PARENTS).repeat(requests, 1)
    depths = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3]).repeat(requests, 1)
    trees = SimpleNamespace(
        parents=parents, num_nodes=torch.full((requests,), columns), nodes=columns - 1
    )
    before = torch.full((requests * columns,), 11)  # the best child's token at every row
    drawn = before.clone()
    decision = synthetic.SyntheticAcceptance(trees, rates, ranks, seed, VOCAB, torch.device("cpu"))
    first = torch.arange(requests + 1, dtype=torch.int32) * columns
    decision.decide(drawn, tokens.flatten(), first, torch.arange(requests, dtype=torch.int32))
    tree = Tree(tokens, parents, depths, trees.num_nodes)
    return walk_greedy(tree, drawn.view(requests, columns)), before, drawn


@pytest.mark.slow  # many requests, each a program in the interpreter
def test_depths_and_ranks_follow_the_given_shares():
    """Within four standard deviations."""
    requests = 120
    found, _, _ = decided([0.9, 0.6, 0.3], [0.5, 0.5], requests)

    def near(share, expected, of=requests):
        return abs(float(share) - expected) < 4 * (expected * (1 - expected) / of) ** 0.5

    accepted, path = found.num_accepted, found.path
    assert near((accepted >= 1).float().mean(), 0.9)
    # Depth 2 exists below the best child only, which is drawn half the time.
    assert near((accepted >= 2).float().mean(), 0.3)
    assert set(path[:, 0].tolist()) == {-1, 1, 2}
    some = int((path[:, 0] > 0).sum())
    assert near((path[:, 0] == 1).sum() / some, 0.5, some)


@pytest.mark.parametrize("rate, length", [(0.0, 0), (1.0, 3)])
def test_none_and_all(rate, length):
    found, before, drawn = decided([rate] * 3, [1.0])
    assert set(found.num_accepted.tolist()) == {length}
    # Rows off the path keep what the target said.
    changed = (before != drawn).view(-1, len(PARENTS))
    assert not changed[:, [2, 3, 5, 7]].any()


def test_the_seed_decides():
    one, two, other = (decided([0.7] * 3, [0.6, 0.4], 8, seed)[0].path for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_rates_that_are_none():
    with pytest.raises(ValueError, match="must not increase"):
        synthetic.conditional([0.5, 0.6])
    with pytest.raises(ValueError, match="3.5 accepted nodes do not fit a path of 3"):
        synthetic.rates_for(3.5, 3)
    rates = synthetic.rates_for(3.2, 5)
    assert sum(rates) == pytest.approx(3.2) and rates[0] ** 3 == pytest.approx(rates[2])
