# SPDX-License-Identifier: Apache-2.0
"""The compiled merge_candidates and choose_tree give their twins' numbers, padding included."""

from __future__ import annotations

import pytest
import torch
from candidate_cases import assert_are_candidates, assert_are_trees, random_chains, random_drafts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tree_cases import random_beams

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.ops import candidates as module
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.candidates import choose_tree, merge_candidates
from vllm_redrafter.tree import candidates as twin
from vllm_redrafter.tree.candidates import Candidates


def assert_equal(found: object, wanted: object) -> None:
    for name, expected in vars(wanted).items():
        mine = getattr(found, name)
        assert mine.dtype == expected.dtype and torch.equal(mine, expected), name


def assert_identical(root, beams, chains, most, max_depth=None) -> Candidates:
    found = merge_candidates(root, beams, chains, most, max_depth)
    assert_equal(found, twin.merge_candidates(root, beams, chains, most, max_depth))
    assert_are_candidates(found)
    return found


def assert_same_trees(candidates: Candidates, counts: Tensor) -> None:
    tree, masks, chosen = choose_tree(candidates, counts)
    wanted, wanted_chosen = twin.choose_tree(candidates, counts)
    assert_equal(tree, wanted)
    assert torch.equal(chosen, wanted_chosen)
    assert_are_trees(tree, masks, chosen)  # masks too


@settings(max_examples=250, deadline=None)
@given(
    batch=st.integers(0, 4),
    length=st.integers(1, 6),
    width=st.integers(0, 12),
    chains=st.integers(0, 6),
    depth=st.integers(1, 9),
    vocab=st.integers(2, 30),
    collapse=st.none() | st.integers(1, 3),
    step=st.sampled_from([0.0, 0.5, 2.0]),
    most=st.integers(0, 90),
    limited=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_identical_to_the_twins(
    batch, length, width, chains, depth, vocab, collapse, step, most, limited, seed
):
    # Widths above the vocabulary leave fillers; a step makes ties; few tokens make equal paths.
    root, beams, found = random_drafts(seed, batch, length, width, chains, depth, vocab, step)
    if beams and collapse:
        beams = Beams(root, beams.tokens % collapse, beams.parents, beams.scores)
    generator = torch.Generator().manual_seed(seed)
    limits = torch.randint(-1, 9, (batch,), generator=generator) if limited else None
    candidates = assert_identical(root, beams, found, most, limits)
    assert_same_trees(candidates, torch.randint(most + 3, (batch,), generator=generator))


def test_every_first_candidates_are_a_tree():
    root, beams, chains = random_drafts(1, 3, 4, 8, 4, 7, 12, step=0.5)
    candidates = merge_candidates(root, beams, chains, 60)
    for count in range(0, 62, 4):
        assert_same_trees(candidates, torch.full((3,), count))


def test_more_candidates_than_one_mask_word():
    drafts = random_drafts(2, 2, 8, 32, 8, 16, 500)
    for most in (62, 63, 64, 127, 128, 300):
        candidates = assert_identical(*drafts, most)
        assert_same_trees(candidates, torch.tensor([most, most // 2]))


@pytest.mark.parametrize("most", [0, 1, 7, 24])
@pytest.mark.parametrize("vocab", [3, 50])
def test_beams_alone_are_the_best_rule(most, vocab):
    beams = random_beams(3, 4, 6, vocab, seed=3, step=0.5)
    candidates = merge_candidates(beams.root, beams, None, most)
    tree, masks, chosen = choose_tree(candidates, torch.full((3,), most))
    wanted, wanted_masks = build_tree(beams, "best", most, fixed_size=True)
    assert_equal(tree, wanted)
    assert torch.equal(masks, wanted_masks)
    assert (candidates.sources[tree.depths[:, 1:] > 0] == twin.FROM_DRAFTER).all()


def test_lookups_alone_are_a_tree_of_chains():
    chains = random_chains(3, 4, 6, 3, seed=4)
    root = torch.arange(3)
    candidates = assert_identical(root, None, chains, 24)
    tree, masks, chosen = choose_tree(candidates, candidates.counts)
    assert_are_trees(tree, masks, chosen)
    for b in range(3):
        paths = [()]
        for node in range(1, int(tree.num_nodes[b])):
            paths.append((*paths[int(tree.parents[b, node])], int(tree.tokens[b, node])))
        real = (chains.scores[b, :, 0] > FILLER_SCORE).nonzero().flatten().tolist()
        rows = [tuple(chains.tokens[b, c].tolist()) for c in real]
        assert set(paths) == {()} | {row[: d + 1] for row in rows for d in range(6)}
        assert (candidates.sources[b, : len(paths) - 1] == twin.FROM_LOOKUP).all()


def test_nan_is_no_score():
    root, beams, chains = random_drafts(5, 3, 3, 4, 3, 5, 9)
    beams.scores[:, -1, ::2] = torch.nan
    chains.scores[:, 0, 2:] = torch.nan
    found = assert_identical(root, beams, chains, 40)
    assert not found.scores.isnan().any()


def test_a_filler_that_the_lookup_knows():
    """The drafter's filler becomes a candidate by the lookup's score, at the lookup's place."""
    root = torch.tensor([1])
    beams = Beams(
        root, torch.tensor([[[5, 7, 9]]]), torch.zeros(1, 1, 3, dtype=torch.int64),
        torch.tensor([[[-1.0, FILLER_SCORE, FILLER_SCORE]]]),
    )  # fmt: skip
    chains = Chains(
        torch.tensor([[[8, 0], [7, 6]]]), torch.ones(1, 2, dtype=torch.int64),
        torch.tensor([[[-1.0, FILLER_SCORE], [-1.0, -2.0]]]),
    )  # fmt: skip
    found = assert_identical(root, beams, chains, 5)
    assert found.tokens.tolist() == [[5, 8, 7, 6, 0]]
    assert found.sources.tolist() == [[1, 2, 2, 2, 0]]


def outputs(batch: int, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Poisoned, of the two operators."""
    row, number = (batch, most), (batch,)
    merged = [torch.full(row, -77) for _ in range(3)]
    merged += [torch.full(row, torch.nan), torch.full(row, -77), torch.full(number, -77)]
    row = (batch, most + 1)
    chosen = [torch.full(row, -77) for _ in range(3)]
    chosen += [torch.full((*row, most // 64 + 1), -77), torch.full(number, -77)]
    return merged, [*chosen, torch.full(row, -77)]


def inputs(beams: Beams | None, chains: Chains | None) -> list[Tensor | None]:
    found = [None] * 3 if beams is None else [beams.tokens, beams.parents, beams.scores]
    return found + ([None] * 2 if chains is None else [chains.tokens, chains.scores])


@pytest.mark.parametrize("width, chains", [(4, 3), (0, 3), (4, 0), (0, 0)])
def test_poisoned_outputs_are_fully_written(width, chains):
    root, beams, found = random_drafts(6, 2, 3, width, chains, 5, 50)
    merged, chosen = outputs(2, 70)
    torch.ops.redrafter.merge_candidates(*merged, *inputs(beams, found), None)
    assert_equal(Candidates(root, *merged), twin.merge_candidates(root, beams, found, 70))
    tokens, parents, depths, counts = merged[0], merged[1], merged[2], merged[5]
    torch.ops.redrafter.choose_tree(*chosen, root, tokens, parents, depths, counts, counts)
    assert all((tensor != -77).all() for tensor in chosen)


def test_strided():
    def turned(part: object) -> object:
        parts = {}
        for name, tensor in vars(part).items():
            order = tuple(reversed(range(tensor.dim())))
            parts[name] = tensor.permute(order).contiguous().permute(order)
        return type(part)(**parts)

    root, beams, chains = random_drafts(7, 3, 4, 6, 3, 5, 40)
    limits = torch.tensor([3, 9, 4, 9, 9, 9])[::2]
    found = assert_identical(root, turned(beams), turned(chains), 12, limits)
    assert_same_trees(turned(found), torch.tensor([12, 0, 5, 0, 9, 0])[::2])


def test_bad_arguments():
    root, beams, chains = random_drafts(8, 1, 3, 4, 2, 5, 50)
    with pytest.raises(ValueError, match="most is -1"):
        merge_candidates(root, beams, chains, -1)
    with pytest.raises(RuntimeError, match="beam_tokens has dtype Int"):
        wrong = Beams(root, beams.tokens.int(), beams.parents, beams.scores)
        merge_candidates(root, wrong, None, 4)
    with pytest.raises(RuntimeError, match="chain_scores has 5 entries in dimension 2"):
        wrong = Chains(chains.tokens[:, :, :4], chains.matched, chains.scores)
        merge_candidates(root, None, wrong, 4)
    with pytest.raises(RuntimeError, match="beam_tokens has 1 entries in dimension 0"):
        merge_candidates(torch.arange(2), beams, None, 4)
    with pytest.raises(RuntimeError, match="max_depth has 2 entries"):
        merge_candidates(root, beams, chains, 4, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="must be given together"):
        merged, _ = outputs(1, 4)
        torch.ops.redrafter.merge_candidates(*merged, beams.tokens, None, None, None, None, None)
    candidates = merge_candidates(root, beams, chains, 4)
    with pytest.raises(RuntimeError, match="counts has 2 entries"):
        choose_tree(candidates, torch.tensor([1, 2]))
    late = Candidates(**{**vars(candidates), "parents": torch.tensor([[-1, 0, 2, 1]])})
    with pytest.raises(RuntimeError, match="parents holds 2 for candidate 2"):
        choose_tree(late, torch.tensor([4]))
    assert choose_tree(late, torch.tensor([2]))[0].num_nodes.tolist() == [3]


def test_no_beams_are_refused():
    root, beams, chains = random_drafts(9, 2, 3, 4, 2, 5, 50)
    outside = Beams(root, beams.tokens, beams.parents * 0 + 4, beams.scores)
    with pytest.raises(RuntimeError, match="beam_parents holds 4; with a beam width of 4"):
        merge_candidates(root, outside, chains, 4)
    rising = beams.scores.clone()
    rising[1, 1] += 100
    rising = Beams(root, beams.tokens, beams.parents, rising)
    for most in (1, 30):
        with pytest.raises(RuntimeError, match="request 1: the candidate of token .* at depth 2"):
            merge_candidates(root, rising, chains, most)
    orphan = beams.scores.clone()
    orphan[0, 0] = FILLER_SCORE
    orphan = Beams(root, beams.tokens, beams.parents, orphan)
    with pytest.raises(RuntimeError, match="or its parent has no score"):
        merge_candidates(root, orphan, None, 30)
    # What is too deep or too unlikely to be taken does not matter, as in the twin.
    assert_identical(root, rising, chains, 30, torch.tensor([9, 1]))
    late = beams.scores - torch.tensor([0.0, 200.0, 100.0])[None, :, None]
    assert_identical(root, Beams(root, beams.tokens, beams.parents, late), None, 4)


def test_without_the_library_the_twins_answer(monkeypatch):
    drafts = random_drafts(10, 2, 3, 4, 2, 5, 50)
    limits = torch.tensor([2, 5])
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    for name in ("merge_candidates", "choose_tree"):  # a call would be an error
        monkeypatch.setattr(getattr(torch.ops.redrafter, name), "default", None)
    found = assert_identical(*drafts, 9, limits)
    assert_identical(drafts[0], None, None, 9)
    assert_same_trees(found, torch.tensor([9, 4]))


def test_opcheck():
    root, beams, chains = random_drafts(11, 2, 3, 4, 2, 5, 50)
    merged, chosen = outputs(2, 9)
    merged[3].zero_()  # NaN is not equal to itself
    merge, choose = (getattr(torch.ops.redrafter, name).default
                     for name in ("merge_candidates", "choose_tree"))  # fmt: skip
    torch.library.opcheck(merge, (*merged, *inputs(beams, chains), torch.tensor([2, 3])))
    torch.library.opcheck(merge, (*merged, *inputs(beams, None), None))
    found = merge_candidates(root, beams, chains, 9)
    parts = (root, found.tokens, found.parents, found.depths, found.counts, torch.tensor([4, 20]))
    torch.library.opcheck(choose, (*chosen, *parts))
