# SPDX-License-Identifier: Apache-2.0
"""The worker's form of one tree, and the walk over a batch of them."""

import random

import numpy as np
import pytest
import torch

from vllm_redrafter.engine.v1.request_tree import RequestTree, chain, chain_masks, mask_words
from vllm_redrafter.engine.v1.tree_check import problem_of
from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import walk_one


def random_request_tree(source, nodes, vocab=5):
    tokens, parents = [0], [-1]
    while len(tokens) <= nodes:
        parent = source.randrange(len(tokens))
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        free = sorted(set(range(vocab)) - taken)
        if free:
            tokens.append(source.choice(free))
            parents.append(parent)
    tree = Tree.from_lists([tokens], [parents])
    return RequestTree(
        tokens[1:], parents[1:], tree.depths[0, 1:].numpy(), tree.packed_mask()[0].numpy()
    )


def bits(row):
    return sum((int(word) & 0xFFFF_FFFF_FFFF_FFFF) << 64 * at for at, word in enumerate(row))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 128, 129])
def test_chain_masks(rows):
    masks = chain_masks(rows)
    assert masks.dtype == np.int64
    assert masks.shape == (rows, mask_words(rows)) == (rows, -(-rows // 64))
    assert [bits(row) for row in masks] == [(1 << row + 1) - 1 for row in range(rows)]


def test_chain_is_a_chain():
    tree = chain([4, 5, 6])
    assert (tree.tokens, tree.parents) == ([4, 5, 6], [0, 1, 2])
    assert tree.depths.tolist() == [1, 2, 3]
    assert [bits(row) for row in tree.masks] == [0b1, 0b11, 0b111, 0b1111]
    assert tree.is_chain and tree.chain_length == len(tree) == 3


def test_a_chain_of_no_token():
    tree = chain([])
    assert len(tree) == 0 and tree.is_chain
    assert tree.child(0, 3) is None
    assert tree.masks.shape == (1, 1)


@pytest.mark.parametrize(
    ("parents", "length"),
    [([0, 1, 2, 0], 3), ([0, 0, 1], 1), ([0, 1, 1, 3], 2), ([0], 1), ([], 0), ([0, 1, 0, 3], 2)],
)
def test_chain_length(parents, length):
    tokens = list(range(len(parents)))
    tree = RequestTree(tokens, parents, np.zeros(len(parents)), np.zeros((len(parents) + 1, 1)))
    assert tree.chain_length == length
    assert tree.is_chain == (length == len(parents))


def test_first_nodes_are_the_same_tree_cut_short():
    source = random.Random(0)
    for nodes in (1, 7, 30, 70):
        tree = random_request_tree(source, nodes)
        assert tree.first(nodes) is tree and tree.first(nodes + 5) is tree
        for count in range(nodes):
            part = tree.first(count)
            again = Tree.from_lists([[0, *tree.tokens[:count]]], [[-1, *tree.parents[:count]]])
            assert len(part) == count
            assert part.tokens == tree.tokens[:count]
            assert part.depths.tolist() == again.depths[0, 1:].tolist()
            packed = again.packed_mask()[0].numpy()
            assert [bits(row) for row in part.masks] == [bits(row) for row in packed]


def test_child():
    source = random.Random(2)
    tree = random_request_tree(source, 25)
    edges = {(p, t): n for n, (p, t) in enumerate(zip(tree.parents, tree.tokens, strict=True), 1)}
    for node in range(26):
        for token in range(5):
            assert tree.child(node, token) == edges.get((node, token))


def test_batch_walk_is_walk_one_for_each_request():
    walk = pytest.importorskip("vllm_redrafter.engine.v1.walk")
    source = random.Random(3)
    for _ in range(50):
        trees = [
            random_request_tree(source, nodes) if (nodes := source.randint(0, 20)) else None
            for _ in range(6)
        ]
        sizes = [1 + (len(tree) if tree else 0) for tree in trees]
        first_row = [sum(sizes[:i]) for i in range(6)]
        target = [source.randrange(5) for _ in range(sum(sizes))]
        asked = []

        def draw(walking, rows, asked=asked, target=target):
            assert len(walking) == len(rows)
            asked.append((list(walking), list(rows)))
            return [target[row] for row in rows]

        result = walk.walk_trees(trees, first_row, draw)
        for i, tree in enumerate(trees):
            own = target[first_row[i] : first_row[i] + sizes[i]]
            path = walk_one([0, *tree.tokens], [-1, *tree.parents], own) if tree else []
            assert result.paths[i] == path
            assert result.tokens[i] == [own[node] for node in [0, *path]]
            # One draw per emitted token: a seeded request must not use up more.
            assert sum(i in walking for walking, _ in asked) == len(result.tokens[i])
        assert asked[0] == (list(range(6)), first_row)
        padded = result.padded_tokens()
        assert padded.dtype == torch.int32
        width = max(map(len, result.tokens))
        assert padded.tolist() == [row + [-1] * (width - len(row)) for row in result.tokens]


@pytest.mark.parametrize("nodes", [6, 70])
def test_some_of_the_nodes(nodes):
    source = random.Random(nodes)
    for _ in range(20):
        tree = random_request_tree(source, nodes)
        kept = []
        for node, parent in enumerate(tree.parents, start=1):
            if (parent == 0 or parent in kept) and source.random() < 0.8:
                kept.append(node)
        some = tree.only(kept)
        assert problem_of(some, 5) == ""
        assert some.tokens == [tree.tokens[node - 1] for node in kept]
        at = [0, *kept]
        assert [at[parent] for parent in some.parents] == [tree.parents[n - 1] for n in kept]
        assert some.depths.tolist() == [int(tree.depths[node - 1]) for node in kept]
