# SPDX-License-Identifier: Apache-2.0
"""The compiled walk takes the paths of its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tree_cases import random_walk_case

from vllm_redrafter.ops import reference
from vllm_redrafter.ops import walk as module
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import walk_greedy

FIELDS = ("path", "num_accepted", "last_node", "next_token")


def outputs(batch: int, depth: int, fill: int = -77) -> list[Tensor]:
    return [torch.full((batch, depth), fill), *(torch.full((batch,), fill) for _ in range(3))]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 5),
    most=st.integers(1, 90),
    depth_bias=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_identical_to_the_twin(batch, most, depth_bias, seed):
    tree, target = random_walk_case(batch, most, depth_bias=depth_bias, seed=seed)
    wanted, found = walk_greedy(tree, target), walk(tree, target)
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.int64
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_paths_of_many_lengths_occur():
    tree, target = random_walk_case(200, 40, depth_bias=0.7, seed=1)
    lengths = walk(tree, target).num_accepted
    assert lengths.min() == 0 and lengths.max() >= 5 and lengths.unique().numel() >= 5


def test_poisoned_outputs_are_fully_written_and_inputs_strided():
    tree, target = random_walk_case(6, 30, depth_bias=0.7, seed=2)
    depth = int(tree.depths.max()) + 3
    wide = torch.full((6, depth + 5), -77)
    out = [wide[:, 2 : 2 + depth], *outputs(6, 1)[1:]]
    strided = [torch.cat([t, t + 1], 1)[:, : t.shape[1]] for t in (tree.tokens, tree.parents)]
    torch.ops.redrafter.walk(
        *out, *strided, tree.num_nodes, torch.cat([target, target], 1)[:, : target.shape[1]]
    )
    wanted = walk_greedy(tree, target)
    assert torch.equal(out[0][:, : wanted.path.shape[1]], wanted.path)
    assert (out[0][:, wanted.path.shape[1] :] == -1).all()
    for found, name in zip(out[1:], FIELDS[1:], strict=True):
        assert torch.equal(found, getattr(wanted, name))
    assert (wide[:, :2] == -77).all() and (wide[:, 2 + depth :] == -77).all()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_paths_are_cut_at_max_depth(depth):
    tree, target = random_walk_case(50, 30, depth_bias=1.0, seed=3)
    whole, cut = walk_greedy(tree, target), walk(tree, target, max_depth=depth)
    assert (whole.num_accepted > depth).any()
    assert torch.equal(cut.path, whole.path[:, :depth])
    assert torch.equal(cut.num_accepted, whole.num_accepted.clamp(max=depth))
    expected = torch.where(
        whole.num_accepted > depth,
        whole.path[:, depth - 1] if depth else torch.zeros(50, dtype=torch.int64),
        whole.last_node,
    )
    assert torch.equal(cut.last_node, expected)
    assert torch.equal(cut.next_token, target.gather(1, expected[:, None])[:, 0])


def test_node_counts_outside_the_tree():
    """0 and less is the root alone, more than M is M; compiled and twin alike."""
    tree, target = random_walk_case(4, 12, depth_bias=1.0, seed=4)
    counts = torch.tensor([0, -3, 1, 99])
    full = Tree(tree.tokens, tree.parents, tree.depths, torch.full((4,), tree.max_nodes))
    wanted = walk_greedy(full, target)
    for operator in (torch.ops.redrafter.walk, reference.walk):
        out = outputs(4, 12)
        operator(*out, tree.tokens, tree.parents, counts, target)
        assert out[1].tolist() == [0, 0, 0, int(wanted.num_accepted[3])]
        assert out[2].tolist() == [0, 0, 0, int(wanted.last_node[3])]
        assert out[3].tolist() == [*target[:3, 0].tolist(), int(wanted.next_token[3])]


def test_bad_arguments():
    tree, target = random_walk_case(2, 10, seed=5)
    with pytest.raises(ValueError, match="max_depth is -1"):
        walk(tree, target, max_depth=-1)
    with pytest.raises(RuntimeError, match="target_tokens has dtype Int; it must be Long"):
        walk(tree, target.int())
    with pytest.raises(RuntimeError, match=r"target_tokens is \[1, .*it must be \[2, "):
        walk(tree, target[:1])
    with pytest.raises(RuntimeError, match="target_tokens must have contiguous rows"):
        walk(tree, target.T.contiguous().T)
    with pytest.raises(RuntimeError, match="tokens has no columns"):
        empty = torch.empty(2, 0, dtype=torch.int64)
        walk(Tree(empty, empty, empty, tree.num_nodes), empty)


def test_without_the_library_the_twin_answers(monkeypatch):
    tree, target = random_walk_case(5, 20, depth_bias=0.7, seed=6)
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    monkeypatch.setattr(torch.ops.redrafter.walk, "default", None)  # a call would be an error
    wanted, found = walk_greedy(tree, target), walk(tree, target)
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_opcheck():
    tree, target = random_walk_case(3, 10, seed=7)
    torch.library.opcheck(
        torch.ops.redrafter.walk.default,
        (*outputs(3, 4), tree.tokens, tree.parents, tree.num_nodes, target),
    )
