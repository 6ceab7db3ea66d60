# SPDX-License-Identifier: Apache-2.0
"""build_tree on CUDA, or its kernel emulated: the integers of the CPU operator."""

from __future__ import annotations

import pytest
import torch
from test_build_tree import random_beams
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.tree.build import build_tree as twin_build_tree

RULES = ("best", "beams")


def outputs(batch: int, most: int) -> list[Tensor]:
    nodes = [torch.full((batch, most), -77) for _ in range(3)]
    return [*nodes, torch.full((batch, most, -(-most // 64)), -77), torch.full((batch,), -77)]


def run(device_ops, beams: Beams, rule: str, most: int) -> list[Tensor]:
    """Into poisoned outputs."""
    ops, device = device_ops
    out = [tensor.to(device) for tensor in outputs(beams.batch_size, most)]
    inputs = (beams.root, beams.tokens, beams.parents, beams.scores)
    ops.build_tree(*out, *(tensor.to(device) for tensor in inputs), rule == "best")
    return [tensor.cpu() for tensor in out]


def assert_identical(device_ops, beams: Beams, rule: str, num_nodes: int | None = None) -> None:
    candidates = beams.tokens[0].numel() if beams.batch_size else 12
    most = 1 + (candidates if num_nodes is None else min(num_nodes, candidates))
    wanted = outputs(beams.batch_size, most)
    torch.ops.redrafter.build_tree(
        *wanted, beams.root, beams.tokens, beams.parents, beams.scores, rule == "best"
    )
    for found, expected in zip(run(device_ops, beams, rule, most), wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(25))
def test_random_drafts(device_ops, rule, seed):
    """Ragged trees: vocabularies below the width leave fillers, rounded scores tie."""
    torch.manual_seed(seed)
    length, width, vocab = (int(torch.randint(1, n, ())) for n in (7, 13, 30))
    step = (0.0, 0.5, 2.0)[seed % 3]
    beams = random_beams(3, length, width, vocab, seed=seed, step=step)
    for num_nodes in (None, int(torch.randint(0, 20, ()))):
        assert_identical(device_ops, beams, rule, num_nodes)


# Interpreted, these take long; smaller drafts stand for them.
@pytest.mark.parametrize(
    "device_ops", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length, width", [(8, 64), (16, 64), (5, 200), (1, 1024), (128, 8)])
def test_many_candidates(device_ops, rule, length, width):
    beams = random_beams(2, length, width, 1500, seed=1)
    for num_nodes in (None, 63, 64, 512):
        assert_identical(device_ops, beams, rule, num_nodes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch, length, width", [(0, 3, 4), (1, 1, 1), (2, 5, 1), (9, 1, 3)])
def test_edges(device_ops, rule, batch, length, width):
    beams = random_beams(batch, length, width, 40, seed=2)
    for num_nodes in (0, 1, None):
        assert_identical(device_ops, beams, rule, num_nodes)


@pytest.mark.parametrize("rule", RULES)
def test_identical_to_the_twin_with_inert_padding(device_ops, rule):
    # Only vocabularies below the width leave fillers, and so trees of fewer nodes.
    few, many = (random_beams(2, 4, 6, vocab, seed=3) for vocab in (5, 40))
    beams = Beams(
        *(
            torch.cat([getattr(few, name), getattr(many, name)])
            for name in ("root", "tokens", "parents", "scores")
        )
    )
    tokens, parents, depths, masks, counts = run(device_ops, beams, rule, 70)
    wanted = twin_build_tree(beams, rule)
    size = wanted.max_nodes
    assert torch.equal(counts, wanted.num_nodes) and counts.unique().numel() > 1
    assert torch.equal(tokens[:, :size], wanted.tokens)
    assert torch.equal(parents[:, :size], wanted.parents)
    assert torch.equal(depths[:, :size], wanted.depths)
    assert torch.equal(masks[:, :size, :1], wanted.packed_mask()) and not masks[:, :size, 1].any()
    assert not tokens[:, size:].any() and not depths[:, size:].any()
    assert (parents[:, size:] == -1).all()
    own = torch.ones(70, dtype=torch.int64) << torch.arange(70) % 64
    bits = torch.zeros(70, 2, dtype=torch.int64)
    bits[torch.arange(70), torch.arange(70) // 64] = own
    assert torch.equal(masks[:, size:], bits[size:].expand(4, -1, -1))


@pytest.mark.parametrize("rule", RULES)
def test_strides(device_ops, rule):
    ops, device = device_ops
    beams = random_beams(3, 4, 6, 40, seed=4)
    wanted = run(device_ops, beams, rule, 12)

    def turned(tensor: Tensor) -> Tensor:
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order).to(device)

    out = [turned(tensor) for tensor in outputs(3, 12)]
    inputs = [turned(t) for t in (beams.root, beams.tokens, beams.parents, beams.scores)]
    ops.build_tree(*out, *inputs, rule == "best")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, wanted, strict=True))


def assert_is_a_tree(found: list[Tensor]) -> None:
    tokens, parents, depths, masks, counts = found
    for b, count in enumerate(counts.tolist()):
        assert 1 <= count <= tokens.shape[1] and parents[b, 0] == -1
        for node in range(1, count):
            parent = int(parents[b, node])
            assert 0 <= parent < node and depths[b, node] == depths[b, parent] + 1
            expected = masks[b, parent].clone()
            expected[node // 64] |= torch.tensor(1) << node % 64
            assert torch.equal(masks[b, node], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_what_the_cpu_refuses_is_left_out(device_ops, rule, seed):
    """Parents outside the width, scores that rise, NaN and inf: a smaller, valid tree."""
    torch.manual_seed(seed)
    beams = random_beams(3, 5, 8, 40, seed=seed)
    parents, scores = beams.parents.clone(), beams.scores.clone()
    wild = torch.rand(parents.shape) < 0.1
    wild[:, 0] = False
    parents[wild] = torch.tensor([-1, 8, 1 << 40, -(1 << 62)])[torch.arange(int(wild.sum())) % 4]
    scores[torch.rand(scores.shape) < 0.1] += 30
    scores[torch.rand(scores.shape) < 0.05] = torch.nan
    scores[torch.rand(scores.shape) < 0.05] = torch.inf
    found = run(device_ops, Beams(beams.root, beams.tokens, parents, scores), rule, 30)
    assert_is_a_tree(found)
    assert not any((tensor == -77).any() for tensor in found)


def test_one_broken_link(device_ops):
    """The candidate is missing with all that follows it; the rest is as ever."""
    root = torch.tensor([1])
    tokens = torch.tensor([[[2, 3], [4, 5], [6, 7]]])
    parents = torch.tensor([[[0, 0], [0, 9], [0, 1]]])
    scores = torch.tensor([[[-1.0, -2.0], [-1.5, -2.5], [-3.0, -4.0]]])
    beams = Beams(root, tokens, parents, scores)
    for rule, wanted in (("best", [1, 2, 4, 6, 3, 0, 0]), ("beams", [1, 2, 4, 6, 0, 0, 0])):
        found = run(device_ops, beams, rule, 7)
        assert found[0].tolist() == [wanted]
        assert_is_a_tree(found)
