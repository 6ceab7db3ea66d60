# SPDX-License-Identifier: Apache-2.0
"""Depths, positions and masks of trees that are given as parents."""

import random

import pytest
import torch

from vllm_redrafter.tree.tree import Tree, pack_bits


def ancestors(parents, node):
    """``node`` and all above it."""
    line = {node}
    while parents[node] >= 0:
        node = parents[node]
        line.add(node)
    return line


def random_parents(source, nodes):
    return [-1, *[source.randrange(node) for node in range(1, nodes)]]


@pytest.mark.parametrize("largest", [1, 5, 63, 64, 65, 130])
def test_masks_and_depths_by_definition(largest):
    source = random.Random(largest)
    rows = [random_parents(source, n) for n in (largest, max(1, largest // 2), 1)]
    tree = Tree.from_lists([[0] * len(row) for row in rows], rows)
    mask, packed = tree.ancestor_mask(), tree.packed_mask()
    assert packed.shape == (3, largest, -(-largest // 64))
    for b, parents in enumerate(rows):
        for i in range(largest):
            line = ancestors(parents, i) if i < len(parents) else {i}
            assert set(mask[b, i].nonzero().flatten().tolist()) == line
            # Python's integers have no sign bit to stumble over.
            words = [int(word) & 0xFFFF_FFFF_FFFF_FFFF for word in packed[b, i]]
            bits = sum(word << 64 * at for at, word in enumerate(words))
            assert bits == sum(1 << j for j in line)
            depth = len(line) - 1 if i < len(parents) else 0
            assert tree.depths[b, i] == depth
    assert tree.num_nodes.tolist() == [len(row) for row in rows]


def test_every_prefix_is_a_tree():
    source = random.Random(3)
    parents = random_parents(source, 40)
    whole = Tree.from_lists([[0] * 40], [parents])
    for count in range(1, 41):
        part = Tree.from_lists([[0] * count], [parents[:count]])
        assert torch.equal(part.ancestor_mask()[0], whole.ancestor_mask()[0, :count, :count])
        assert torch.equal(part.depths[0], whole.depths[0, :count])


def test_pack_bits_of_all_64_columns():
    assert pack_bits(torch.ones(1, 64, dtype=torch.bool)).tolist() == [[-1]]
    assert pack_bits(torch.tensor([[False] * 63 + [True]])).tolist() == [[-(2**63)]]
    assert pack_bits(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_sglang_build_eagle_tree():
    """SGLang, test_build_eagle_tree.py: two trees of eight nodes; parents from its next lists."""
    parents = [[-1, 0, 0, 1, 2, 3, 4, 5], [-1, 0, 1, 1, 1, 1, 3, 6]]
    tokens = [
        [29974, 29896, 29906, 29889, 29974, 29946, 29896, 29946],
        [13, 13, 22550, 4136, 16492, 8439, 29871, 29941],
    ]
    tree = Tree.from_lists(tokens, parents)
    positions = tree.positions(torch.tensor([5, 10]))
    assert positions.tolist() == [
        [5, 6, 6, 7, 7, 8, 8, 9],
        [10, 11, 12, 12, 12, 12, 13, 14],
    ]
    assert first_children(parents[0]) == [1, 3, 4, 5, 6, 7, -1, -1]
    assert first_children(parents[1]) == [1, 2, -1, 6, -1, -1, 7, -1]
    assert next_siblings(parents[0]) == [-1, 2, -1, -1, -1, -1, -1, -1]
    assert next_siblings(parents[1]) == [-1, -1, 3, 4, 5, -1, -1, -1]


def test_sglang_mask_to_lists():
    """SGLang, test_ngram_utils.py: the rows of the mask 1000, 1100, 1010, 1011."""
    parents = [-1, 0, 0, 2]
    tree = Tree.from_lists([[0] * 4], [parents])
    rows = ["".join(str(int(bit)) for bit in row) for row in tree.ancestor_mask()[0]]
    assert rows == ["1000", "1100", "1010", "1011"]
    assert tree.positions(torch.tensor([12])).tolist() == [[12, 13, 13, 14]]
    assert first_children(parents) == [1, -1, 3, -1]
    assert next_siblings(parents) == [-1, 2, -1, -1]


def first_children(parents):
    return [parents.index(node) if node in parents else -1 for node in range(len(parents))]


def next_siblings(parents):
    return [
        next((n for n in range(node + 1, len(parents)) if node and parents[n] == parent), -1)
        for node, parent in enumerate(parents)
    ]


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([[]], [[]], "at least the root, got 0 tokens and 0 parents"),
        ([[1, 2]], [[-1]], "got 2 tokens and 1 parents"),
        ([[1, 2]], [[-1, 1]], "Node 1 has parent 1"),
        ([[1, 2]], [[-1, -1]], "Node 1 has parent -1"),
        ([[1]], [[0]], "Node 0 has parent 0"),
        ([[1, 2, 3]], [[-1, 2, 0]], "Node 1 has parent 2"),
    ],
)
def test_lists_that_are_no_tree(tokens, parents, message):
    with pytest.raises(ValueError, match=message):
        Tree.from_lists(tokens, parents)
