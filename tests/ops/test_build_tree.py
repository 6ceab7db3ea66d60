# SPDX-License-Identifier: Apache-2.0
"""The compiled build_tree gives its twin's integers, padding included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_cases import random_beams

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.ops import build_tree as module
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.tree.build import build_tree as twin_build_tree


def assert_identical(beams: Beams, rule: str, num_nodes: int | None) -> None:
    wanted = twin_build_tree(beams, rule, num_nodes)
    tree, masks = build_tree(beams, rule, num_nodes)
    for name in ("tokens", "parents", "depths", "num_nodes"):
        found, expected = getattr(tree, name), getattr(wanted, name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert torch.equal(masks, wanted.packed_mask())


@pytest.mark.parametrize("rule", ["best", "beams"])
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 4),
    length=st.integers(1, 6),
    width=st.integers(1, 12),
    vocab=st.integers(1, 30),
    num_nodes=st.none() | st.integers(0, 80),
    step=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_identical_to_the_twin(rule, batch, length, width, vocab, num_nodes, step, seed):
    # Widths above the vocabulary leave fillers among the candidates; a step makes ties.
    assert_identical(
        random_beams(batch, length, width, vocab, seed=seed, step=step), rule, num_nodes
    )


@pytest.mark.parametrize("rule", ["best", "beams"])
def test_more_nodes_than_one_mask_word(rule):
    for num_nodes in (62, 63, 64, 65, 127, 128, 200, None):
        assert_identical(random_beams(3, 5, 64, 500, seed=1), rule, num_nodes)


@pytest.mark.parametrize("rule", ["best", "beams"])
def test_poisoned_outputs_are_fully_written(rule):
    beams = random_beams(2, 3, 4, 50, seed=2)
    most = 1 + 12
    out = [torch.full((2, most), -77) for _ in range(3)]
    masks, counts = torch.full((2, most, 1), -77), torch.full((2,), -77)
    torch.ops.redrafter.build_tree(
        *out, masks, counts, beams.root, beams.tokens, beams.parents, beams.scores, rule == "best"
    )
    assert all((tensor != -77).all() for tensor in (*out, masks, counts))


def test_strided_beams():
    beams = random_beams(3, 4, 6, 40, seed=3)
    turned = Beams(
        beams.root,
        beams.tokens.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        beams.parents.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        beams.scores.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    )
    assert_identical(turned, "best", 11)


def test_bad_arguments():
    beams = random_beams(1, 3, 4, 50, seed=4)
    with pytest.raises(ValueError, match="tree is 'worst'"):
        build_tree(beams, "worst")
    with pytest.raises(ValueError, match="num_nodes is -1"):
        build_tree(beams, "best", -1)
    with pytest.raises(RuntimeError, match="parents holds 4; with a beam width of 4"):
        build_tree(Beams(beams.root, beams.tokens, beams.parents * 0 + 4, beams.scores))
    rising = beams.scores.clone()
    rising[0, 1] += 100
    with pytest.raises(RuntimeError, match="scores higher than its parent"):
        build_tree(Beams(beams.root, beams.tokens, beams.parents, rising), "best", 4)
    with pytest.raises(RuntimeError, match="tokens has dtype Int"):
        build_tree(Beams(beams.root, beams.tokens.int(), beams.parents, beams.scores))


def test_without_the_library_the_twin_answers(monkeypatch):
    beams = random_beams(2, 3, 4, 50, seed=5)
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    monkeypatch.setattr(torch.ops.redrafter.build_tree, "default", None)  # a call would be an error
    assert_identical(beams, "best", 7)


@pytest.mark.parametrize("best", [True, False])
def test_opcheck(best):
    beams = random_beams(2, 3, 4, 50, seed=6)
    out = [torch.zeros(2, 8, dtype=torch.int64) for _ in range(3)]
    masks, counts = torch.zeros(2, 8, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.redrafter.build_tree.default,
        (*out, masks, counts, beams.root, beams.tokens, beams.parents, beams.scores, best),
    )
