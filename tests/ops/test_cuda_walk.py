# SPDX-License-Identifier: Apache-2.0
"""walk on CUDA, or its kernel emulated: the integers of the twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from tree_cases import random_walk_case

from vllm_redrafter.ops import reference
from vllm_redrafter.tree.tree import Tree


def outputs(batch: int, depth: int) -> list[Tensor]:
    return [torch.full((batch, depth), -77), *(torch.full((batch,), -77) for _ in range(3))]


def assert_identical(device_ops, tree: Tree, target: Tensor, depth: int) -> Tensor:
    """Outputs are poisoned; returns the path lengths."""
    ops, device = device_ops
    inputs = (tree.tokens, tree.parents, tree.num_nodes, target)
    wanted = outputs(target.shape[0], depth)
    reference.walk(*wanted, *inputs)
    found = [out.to(device) for out in outputs(target.shape[0], depth)]
    ops.walk(*found, *(tensor.to(device) for tensor in inputs))
    for out, expected in zip(found, wanted, strict=True):
        assert torch.equal(out.cpu(), expected)
    return wanted[1]


@pytest.mark.parametrize("depth_bias", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("most", [1, 2, 31, 32, 33, 64, 130, 600])
def test_identical_to_the_twin(device_ops, most, depth_bias):
    vocab = 6 if most > 300 else 4
    tree, target = random_walk_case(7, most, depth_bias=depth_bias, seed=most, vocab=vocab)
    assert_identical(device_ops, tree, target, tree.max_nodes - 1)


def test_long_paths_across_many_warps_of_nodes(device_ops):
    """A chain of 300 that agrees with the target throughout, in part, and not at all."""
    tokens = torch.arange(300).repeat(3, 1)
    parents = tokens - 1
    target = tokens + 1
    target[1, 97] = 5
    target[2, 0] = 0
    tree = Tree(tokens, parents, tokens, torch.full((3,), 300))
    for depth in (299, 310, 96, 97, 98, 32, 1, 0):
        lengths = assert_identical(device_ops, tree, target, depth)
        assert lengths.tolist() == [min(depth, 299), min(depth, 97), 0]


@pytest.mark.parametrize("batch", [0, 1, 4, 5, 33])
def test_batches(device_ops, batch):
    tree, target = random_walk_case(batch, 20, depth_bias=0.7, seed=batch)
    assert_identical(device_ops, tree, target, 6)


def test_equal_siblings_take_the_first(device_ops):
    tokens = torch.tensor([[9, 5, 5, 6, 7]])
    tree = Tree(tokens, torch.tensor([[-1, 0, 0, 1, 2]]), tokens, torch.tensor([5]))
    lengths = assert_identical(device_ops, tree, torch.tensor([[5, 6, 7, 0, 0]]), 4)
    assert lengths.tolist() == [2]


def test_counts_outside_the_tree_and_wild_parents(device_ops):
    tree, target = random_walk_case(4, 40, depth_bias=1.0, seed=1)
    parents = tree.parents.clone()
    parents[3, 5:9] = torch.tensor([-5, 1 << 40, 8, 7])
    wild = Tree(tree.tokens, parents, tree.depths, torch.tensor([0, -3, 1, 99]))
    assert_identical(device_ops, wild, target, 12)


def test_row_strides(device_ops):
    ops, device = device_ops
    tree, target = random_walk_case(6, 30, depth_bias=0.7, seed=2)
    columns = tree.max_nodes
    wide = torch.full((6, 40), -77).to(device)
    out = [wide[:, 3:20], *(t.to(device) for t in outputs(6, 1)[1:])]
    strided = [
        torch.cat([t + 1, t], 1).to(device)[:, columns:]
        for t in (tree.tokens, tree.parents, target)
    ]
    ops.walk(*out, strided[0], strided[1], tree.num_nodes.to(device), strided[2])
    wanted = outputs(6, 17)
    reference.walk(*wanted, tree.tokens, tree.parents, tree.num_nodes, target)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, wanted, strict=True))
    assert (wide[:, :3] == -77).all() and (wide[:, 20:] == -77).all()
