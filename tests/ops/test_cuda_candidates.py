# SPDX-License-Identifier: Apache-2.0
"""merge_candidates and choose_tree on CUDA, or their kernels emulated: the CPU's numbers."""

from __future__ import annotations

import pytest
import torch
from candidate_cases import assert_are_candidates, assert_are_trees, random_drafts
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.tree.candidates import Candidates
from vllm_redrafter.tree.candidates import merge_candidates as twin_merge_candidates
from vllm_redrafter.tree.tree import Tree

CPU = (torch.ops.redrafter, torch.device("cpu"))


def turned(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values, with the strides of the transposed tensor."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order).to(device)


def merge(
    device_ops, root: Tensor, beams: Beams | None, chains: Chains | None, most: int,
    max_depth: Tensor | None = None, place=Tensor.to,
) -> Candidates:  # fmt: skip
    """Into poisoned outputs."""
    ops, device = device_ops
    batch = root.shape[0]
    out = [torch.full((batch, most), -77) for _ in range(3)]
    out += [torch.full((batch, most), torch.nan), torch.full((batch, most), -77)]
    out = [place(tensor, device) for tensor in (*out, torch.full((batch,), -77))]
    inputs = (None,) * 3 if beams is None else (beams.tokens, beams.parents, beams.scores)
    inputs += (None,) * 2 if chains is None else (chains.tokens, chains.scores)
    ops.merge_candidates(
        *out, *(None if part is None else place(part, device) for part in (*inputs, max_depth))
    )
    return Candidates(root, *(tensor.cpu() for tensor in out))


def choose(
    device_ops, candidates: Candidates, counts: Tensor, place=Tensor.to
) -> tuple[Tree, Tensor, Tensor]:
    """Into poisoned outputs."""
    ops, device = device_ops
    batch, columns = candidates.tokens.shape[0], candidates.tokens.shape[1] + 1
    shapes = [(batch, columns)] * 3 + [(batch, columns, -(-columns // 64)), (batch,)]
    out = [place(torch.full(shape, -77), device) for shape in (*shapes, (batch, columns))]
    inputs = (candidates.root, candidates.tokens, candidates.parents, candidates.depths)
    ops.choose_tree(
        *out, *(place(part, device) for part in (*inputs, candidates.counts, counts))
    )
    tokens, parents, depths, masks, num_nodes, chosen = (tensor.cpu() for tensor in out)
    return Tree(tokens, parents, depths, num_nodes), masks, chosen


def assert_equal(found: object, wanted: object) -> None:
    for name, expected in vars(wanted).items():
        assert torch.equal(getattr(found, name), expected), name


def assert_identical(device_ops, drafts, most: int, max_depth: Tensor | None = None) -> None:
    wanted = merge(CPU, *drafts, most, max_depth)
    found = merge(device_ops, *drafts, most, max_depth)
    assert_equal(found, wanted)
    counts = torch.randint(0, most + 3, wanted.counts.shape)
    tree, masks, chosen = choose(device_ops, found, counts)
    wanted_tree, wanted_masks, wanted_chosen = choose(CPU, wanted, counts)
    assert_equal(tree, wanted_tree)
    assert torch.equal(masks, wanted_masks) and torch.equal(chosen, wanted_chosen)


@pytest.mark.parametrize("seed", range(30))
def test_random_drafts(device_ops, seed):
    """Equal paths in and between the sources, fillers, ties, missing chains, limits of depth."""
    torch.manual_seed(seed)
    length, width, chains, depth, vocab = (
        int(torch.randint(low, high, ()))
        for low, high in ((1, 7), (0, 13), (0, 6), (1, 10), (2, 30))
    )
    drafts = random_drafts(
        seed, 3, length, width, chains, depth, vocab, step=(0.0, 0.5, 2.0)[seed % 3]
    )
    max_depth = torch.randint(0, 8, (3,)) if seed % 2 else None
    for most in (int(torch.randint(0, 20, ())), 90):
        assert_identical(device_ops, drafts, most, max_depth)


@pytest.mark.parametrize(
    "length, width, chains, depth",
    [(8, 64, 8, 16), (1, 512, 0, 1), (3, 4, 100, 8), (70, 2, 2, 130)],
)
def test_many_candidates(device_ops, length, width, chains, depth):
    drafts = random_drafts(1, 2, length, width, chains, depth, 600, step=0.5)
    for most in (62, 63, 64, 300):
        assert_identical(device_ops, drafts, most)


@pytest.mark.parametrize("batch, width, chains", [(0, 3, 2), (2, 0, 0), (1, 1, 0), (9, 0, 1)])
def test_edges(device_ops, batch, width, chains):
    drafts = random_drafts(2, batch, 3, width, chains, 5, 40)
    for most in (0, 1, 20):
        assert_identical(device_ops, drafts, most)


def test_strides(device_ops):
    drafts = random_drafts(4, 3, 4, 6, 3, 5, 40)
    limits = torch.tensor([5, 2, 9])
    wanted = merge(CPU, *drafts, 12, limits)
    assert_equal(merge(device_ops, *drafts, 12, limits, turned), wanted)
    counts = torch.tensor([12, 5, 3])
    found = choose(device_ops, wanted, counts, turned)
    tree, masks, chosen = choose(CPU, wanted, counts)
    assert_equal(found[0], tree)
    assert torch.equal(found[1], masks) and torch.equal(found[2], chosen)


@pytest.mark.parametrize("seed", range(6))
def test_what_the_cpu_refuses_is_left_out(device_ops, seed):
    """Parents outside the width, scores that rise, NaN and inf: fewer candidates, valid ones."""
    torch.manual_seed(seed)
    root, beams, chains = random_drafts(seed, 3, 5, 8, 4, 7, 30)
    parents = beams.parents.clone()
    wild = torch.rand(parents.shape) < 0.1
    wild[:, 0] = False
    parents[wild] = torch.tensor([-1, 8, 1 << 40, -(1 << 62)])[torch.arange(int(wild.sum())) % 4]
    for scores in (beams.scores, chains.scores):
        scores[torch.rand(scores.shape) < 0.1] += 30
        scores[torch.rand(scores.shape) < 0.05] = torch.nan
        scores[torch.rand(scores.shape) < 0.05] = torch.inf
    beams = Beams(root, beams.tokens, parents, beams.scores)
    found = merge(device_ops, root, beams, chains, 30)
    assert_are_candidates(found)
    trees = choose(device_ops, found, torch.tensor([30, 10, 4]))
    assert_are_trees(*trees)


def test_one_broken_link(device_ops):
    """The path is missing with all that extends it; the next ones take its place."""
    root = torch.tensor([1])
    tokens = torch.tensor([[[2, 3], [4, 5], [6, 7]]])
    parents = torch.tensor([[[0, 0], [0, 9], [0, 1]]])
    scores = torch.tensor([[[-1.0, -2.0], [-1.5, -2.5], [-3.0, -4.0]]])
    # The third token of the chain scores higher than the second.
    chains = Chains(
        torch.tensor([[[8, 9, 10, 11]]]), torch.tensor([[1]]),
        torch.tensor([[[-2.0, -4.0, -3.5, -5.0]]]),
    )  # fmt: skip
    found = merge(device_ops, root, Beams(root, tokens, parents, scores), chains, 6)
    assert found.tokens.tolist() == [[2, 4, 3, 8, 6, 9]]
    assert found.parents.tolist() == [[-1, 0, -1, -1, 1, 3]]
    assert found.counts.tolist() == [6]
    assert_are_candidates(found)


def test_a_candidate_before_its_parent(device_ops):
    """It is missing in the tree, with what hangs on it."""
    root, beams, chains = random_drafts(7, 1, 3, 4, 0, 1, 40)
    candidates = twin_merge_candidates(root, beams, chains, 6)
    parents = torch.tensor([[-1, 3, 1, -1, 99, -2]])
    depths = torch.tensor([[1, 2, 3, 1, 2, 1]])
    broken = Candidates(**{**vars(candidates), "parents": parents, "depths": depths})
    tree, masks, chosen = choose(device_ops, broken, torch.tensor([6]))
    assert chosen.tolist() == [[-1, 0, 3, -1, -1, -1, -1]]
    assert tree.num_nodes.tolist() == [3]
    assert_are_trees(tree, masks, chosen)
