# SPDX-License-Identifier: Apache-2.0
"""Whatever a rank drafted, it verifies the first rank's trees."""

import pytest
import torch
from vllm.distributed import parallel_state

from vllm_redrafter.engine import first_rank
from vllm_redrafter.tree.tree import Tree


class FakeGroup:
    """One rank of two; the first one's messages wait in a list for the other."""

    world_size = 2

    def __init__(self, rank, messages):
        self.is_first_rank = rank == 0
        self.messages = messages

    def broadcast_object(self, obj):
        if not self.is_first_rank:
            assert obj is None
            return self.messages.pop()
        self.messages.append(obj)
        return obj

    def broadcast(self, tensor):
        assert tensor.is_contiguous()
        if not self.is_first_rank:
            return tensor.copy_(self.messages.pop())
        self.messages.append(tensor.clone())
        return tensor


@pytest.fixture
def as_rank(monkeypatch):
    messages = []

    def become(rank):
        group = FakeGroup(rank, messages)
        monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)

    return become


CHAIN = Tree.from_lists([[5, 6, 7, 8], [1, 2, 0, 0]], [[-1, 0, 1, 2], [-1, 0, 0, 0]])
BRANCHES = Tree.from_lists([[5, 6, 7, 9], [1, 2, 0, 0]], [[-1, 0, 0, 1], [-1, 0, 0, 0]])

FIRST = torch.tensor([[0, 1, 2, 3], [0, 2, 0, 0]])


def same(tree, other):
    return all(torch.equal(vars(tree)[name], vars(other)[name]) for name in vars(tree))


def test_trees_on_the_device(as_rank):
    as_rank(0)
    tree, masks, sources = first_rank.first_ranks_trees(CHAIN, CHAIN.packed_mask(), FIRST)
    assert same(tree, CHAIN) and torch.equal(masks, CHAIN.packed_mask())
    assert torch.equal(sources, FIRST)
    as_rank(1)
    tree, masks, sources = first_rank.first_ranks_trees(BRANCHES, BRANCHES.packed_mask(), -FIRST)
    assert same(tree, CHAIN) and torch.equal(masks, CHAIN.packed_mask())
    assert torch.equal(sources, FIRST)
    assert first_rank.differ(BRANCHES, tree).tolist() == [True, False]


def test_trees_of_more_nodes_than_a_mask_word(as_rank):
    rows = 70
    chain = Tree.from_lists([list(range(rows))], [list(range(-1, rows - 1))])
    as_rank(0)
    tree, masks, sources = first_rank.first_ranks_trees(chain, chain.packed_mask(), chain.tokens)
    assert masks.shape == (1, rows, 2)
    assert same(tree, chain) and torch.equal(masks, chain.packed_mask())
    assert torch.equal(sources, chain.tokens)


def test_objects(as_rank):
    as_rank(0)
    assert first_rank.first_ranks_object(["mine"]) == ["mine"]
    as_rank(1)
    assert first_rank.several_ranks()
    assert first_rank.first_ranks_object(["another"]) == ["mine"]
