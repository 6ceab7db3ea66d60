# SPDX-License-Identifier: Apache-2.0
"""Beam search against an exhaustive reference, and its defined outcomes for odd inputs."""

import itertools

import pytest
import torch

from vllm_redrafter import Drafter, DrafterConfig, beam_search
from vllm_redrafter.drafter.beam_search import (
    FILLER_SCORE,
    FLOOR,
    greedy_chain,
    log_probabilities,
    top_k_lowest_index,
)


def random_drafter(vocab=11, hidden=6, exit_dim=8, layers=1, rnn=True, draft_vocab=None, seed=0):
    torch.manual_seed(seed)
    rows = vocab if draft_vocab is None else len(draft_vocab)
    drafter = Drafter(DrafterConfig(vocab, hidden, exit_dim, layers, rnn, rows))
    drafter.embedding = torch.randn(vocab, hidden)
    if draft_vocab is not None:
        drafter.draft_vocab = torch.tensor(draft_vocab)
    return drafter.requires_grad_(False)


def path_score(drafter, context, path):
    """Sum of log-probabilities of ``path[1:]``, one evaluation at a time, no beams."""
    state, total = drafter.initial_state(), 0.0
    for known, drafted in itertools.pairwise(path):
        logits, state = drafter(context, torch.tensor(known), state)
        row = drafted
        if drafter.draft_vocab is not None:
            row = drafter.draft_vocab.tolist().index(drafted)
        total += log_probabilities(logits)[row].item()
    return total


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("draft_vocab", [None, [7, 2, 9, 4, 0]])
def test_a_wide_beam_finds_the_likeliest_paths(rnn, draft_vocab):
    """With W at least V^(L-1) nothing is pruned, so the result must be the exhaustive best."""
    drafter = random_drafter(vocab=10, rnn=rnn, draft_vocab=draft_vocab or [0, 3, 5, 8, 9])
    ids = drafter.draft_vocab.tolist()
    context, known = torch.randn(2, 6), torch.tensor([1, 6])
    beams = beam_search(drafter, context, known, beam_width=25, draft_length=3)
    for b in range(2):
        scored = sorted(
            ((path_score(drafter, context[b], (int(known[b]), *path)), path)
             for path in itertools.product(ids, repeat=3)),
            reverse=True,
        )  # fmt: skip
        expected = scored[:25]
        assert beams.sequences()[b, :, 1:].tolist() == [list(path) for _, path in expected]
        torch.testing.assert_close(beams.scores[b, -1], torch.tensor([s for s, _ in expected]))


def test_every_kept_candidate_has_the_score_of_its_path():
    drafter = random_drafter(vocab=40, seed=3)
    context, known = torch.randn(3, 6), torch.tensor([1, 2, 3])
    beams = beam_search(drafter, context, known, beam_width=4, draft_length=4)
    for b, depth, k in itertools.product(range(3), range(4), range(4)):
        path, at = [], k
        for d in range(depth, -1, -1):
            path.append(int(beams.tokens[b, d, at]))
            at = int(beams.parents[b, d, at])
        path = (int(known[b]), *reversed(path))
        assert beams.scores[b, depth, k].item() == pytest.approx(
            path_score(drafter, context[b], path), rel=1e-5
        )


def test_batch_rows_do_not_influence_each_other():
    drafter = random_drafter(vocab=50, seed=5)
    context, known = torch.randn(5, 6), torch.arange(5)
    together = beam_search(drafter, context, known, 3, 3)
    for b in range(5):
        alone = beam_search(drafter, context[b : b + 1], known[b : b + 1], 3, 3)
        assert torch.equal(alone.tokens[0], together.tokens[b])


def test_ties_go_to_the_lowest_parent_then_the_lowest_row():
    drafter = random_drafter(vocab=8)
    for parameter in drafter.parameters():
        parameter.zero_()
    beams = beam_search(drafter, torch.zeros(1, 6), torch.tensor([5]), 3, 2)
    assert beams.tokens[0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert beams.parents[0].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_top_k_lowest_index_equals_a_stable_sort():
    generator = torch.Generator().manual_seed(1)
    for k in (1, 3, 7):
        values = torch.randint(0, 4, (6, 7), generator=generator).float()
        got, index = top_k_lowest_index(values, k)
        want = torch.sort(values, descending=True, stable=True)
        assert torch.equal(index, want.indices[:, :k])
        assert torch.equal(got, want.values[:, :k])


def test_a_beam_wider_than_the_vocabulary_is_filled_up():
    drafter = random_drafter(vocab=3)
    beams = beam_search(drafter, torch.randn(1, 6), torch.tensor([0]), 8, 2)
    first = beams.scores[0, 0]
    assert (first[:3] > FILLER_SCORE / 2).all() and (first[3:] < FILLER_SCORE / 2).all()
    assert beams.parents[0, 0, :3].tolist() == [0, 0, 0]
    # Depth 2 has 9 real paths for 8 places: no filler is left.
    assert (beams.scores[0, 1] > FILLER_SCORE / 2).all()


def test_top_k_renormalises_and_keeps_ties_with_the_kth():
    logits = torch.tensor([3.0, 1.0, 1.0, 0.0])
    log_probs = log_probabilities(logits, top_k=2)
    assert log_probs[:3].exp().sum().item() == pytest.approx(1.0)
    assert log_probs[3] < FILLER_SCORE / 2
    assert torch.equal(log_probabilities(logits, 4), log_probabilities(logits, 0))
    assert torch.equal(log_probabilities(logits, 99), log_probabilities(logits, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_odd_logits_give_finite_scores(bad):
    logits = torch.tensor([[0.0, bad, 1.0], [bad, bad, bad]])
    for top_k in (0, 1, 2):
        log_probs = log_probabilities(logits, top_k)
        assert torch.isfinite(log_probs).all() and (log_probs >= FLOOR).all()
    best = log_probabilities(logits)[0].argmax().item()
    assert best == (1 if bad == float("inf") else 2)


def test_odd_weights_do_not_crash_and_give_valid_tokens():
    drafter = random_drafter(vocab=9)
    drafter.lm_head[-1].weight[4] = float("nan")
    beams = beam_search(drafter, torch.randn(2, 6), torch.tensor([1, 2]), 4, 3)
    assert torch.isfinite(beams.scores).all()
    assert ((beams.tokens >= 0) & (beams.tokens < 9)).all()
    assert not (beams.tokens[:, 0, :3] == 4).any()


def test_an_empty_batch():
    beams = beam_search(random_drafter(), torch.empty(0, 6), torch.empty(0, dtype=torch.long), 4, 2)
    assert beams.tokens.shape == (0, 2, 4)


@pytest.mark.parametrize(("width", "length", "top_k"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_settings_are_refused(width, length, top_k):
    with pytest.raises(ValueError, match="at least"):
        beam_search(random_drafter(), torch.randn(1, 6), torch.tensor([0]), width, length, top_k)


@pytest.mark.parametrize("width, seed", [(1, 0), (6, 1), (6, 2), (3, 3)])
def test_the_greedy_chain_is_what_a_beam_of_one_keeps(width, seed):
    drafter = random_drafter(vocab=30, seed=seed)
    context, known = torch.randn(20, 6), torch.arange(20)
    for length in (1, 2, 4):
        chain = greedy_chain(beam_search(drafter, context, known, width, 4), length)
        alone = beam_search(drafter, context, known, 1, length)
        assert chain.tokens.shape == alone.tokens.shape and not chain.parents.any()
        kept = chain.scores > FILLER_SCORE
        # What a wider beam pruned, with all behind it, is a filler; the first is never pruned.
        assert kept[:, 0].all() and not (kept[:, 1:] & ~kept[:, :-1]).any()
        assert torch.equal(chain.tokens[kept], alone.tokens[kept])
        torch.testing.assert_close(chain.scores[kept], alone.scores[kept])
        assert kept.all() or width > 1
