# SPDX-License-Identifier: Apache-2.0
"""Drafters and inputs of the draft tests, and how two drafts are compared."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_redrafter.drafter.beam_search import Beams, log_probabilities
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter

# Scores below this hold a filler's -50000: there a float32 is too coarse to tell near ties apart.
# What is drafted there is tested with exact logits (test_exact_logits).
FILLERS_BELOW = -1000.0


def make_drafter(
    *, vocab, hidden, exit_dim, blocks, rnn, draft_vocab=None, seed=0, dtype=torch.float32
) -> Drafter:
    generator = torch.Generator().manual_seed(seed)
    config = DrafterConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        exit_dim=exit_dim,
        num_draft_layers=blocks,
        rnn=rnn,
        draft_vocab_size=draft_vocab or vocab,
    )
    drafter = Drafter(config).requires_grad_(False)
    for parameter in drafter.parameters():
        spread = math.sqrt(2.0 / parameter.shape[-1])
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    drafter.to(dtype)
    drafter.embedding = torch.randn(vocab, hidden, generator=generator).to(dtype)
    if draft_vocab:
        drafter.draft_vocab = torch.randperm(vocab, generator=generator)[:draft_vocab]
    return drafter.eval()


def make_inputs(drafter: Drafter, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    context = torch.randn(batch, drafter.config.hidden_size, generator=generator)
    token = torch.randint(drafter.config.vocab_size, (batch,), generator=generator)
    return context.to(drafter.dtype), token


def random_case(seed: int) -> dict:
    rng = random.Random(seed)
    hidden = rng.choice([5, 16, 33, 64])
    vocab = rng.choice([2, 5, 31, 31, 97, 500, 5000])
    return {
        "drafter": {
            "vocab": vocab,
            "hidden": hidden,
            "exit_dim": rng.choice([2 * hidden, 2 * hidden, 24, 7, hidden]),
            "blocks": rng.randrange(4),
            "rnn": rng.random() < 0.5,
            "draft_vocab": rng.choice([None, None, max(1, vocab // 3)]),
            "seed": seed,
        },
        "width": rng.choice([1, 2, 3, 4, 8, 12]),
        "length": rng.randint(1, 5),
        "batch": rng.choice([0, 1, 2, 3, 9]),
        "top_k": rng.choice([0, 0, 1, 5, 50]),
    }


def smallest_gaps(drafter: Drafter, context: Tensor, beams: Beams, top_k: int) -> Tensor:
    """[B]: the least difference between two of the W + 1 best candidates of any depth.

    Where it is small, rounding may decide which candidate is kept or in which order.
    """
    batch, length, width = beams.tokens.shape
    context = context[:, None].expand(-1, width, -1)
    state = drafter.initial_state(batch, width)
    scores = torch.full((batch, width), -50_000.0)
    scores[:, 0] = 0.0
    last = beams.root[:, None].expand(-1, width)
    gaps = torch.full((batch,), math.inf)
    for depth in range(length):
        logits, state = drafter(context, last, state)
        candidates = (scores[:, :, None] + log_probabilities(logits, top_k)).flatten(1)
        best = candidates.topk(min(width + 1, candidates.shape[1]), dim=-1).values
        gap = best[:, :-1] - best[:, 1:]
        gap[best[:, 1:] < FILLERS_BELOW] = math.inf
        gaps = torch.minimum(gaps, F.pad(gap, (0, 1), value=math.inf).amin(1))
        scores, parents = beams.scores[:, depth], beams.parents[:, depth]
        last = beams.tokens[:, depth]
        state = state.gather(1, parents[:, :, None].expand_as(state))
    return gaps


def assert_same(got: Beams, expected: Beams, decided: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.scores, expected.scores, rtol=tolerance, atol=tolerance)
    real = (expected.scores > FILLERS_BELOW) & decided[:, None, None]
    assert torch.equal(got.tokens[real], expected.tokens[real])
    assert torch.equal(got.parents[real], expected.parents[real])
    assert torch.equal(got.root, expected.root)


def identical(a: Beams, b: Beams) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "parents", "scores")
    )


def drafter_of_logits(logits: list[float], draft_vocab: list[int] | None = None) -> Drafter:
    """The same logits at every evaluation, exactly: they are the weights of a context of 1."""
    rows = len(logits)
    vocab = max(draft_vocab) + 1 if draft_vocab else rows
    config = DrafterConfig(
        vocab_size=vocab,
        hidden_size=1,
        exit_dim=2,
        num_draft_layers=0,
        rnn=False,
        draft_vocab_size=rows,
    )
    drafter = Drafter(config).requires_grad_(False)
    drafter.lm_head[0].weight.copy_(torch.tensor([[x, 0.0] for x in logits]))
    drafter.embedding = torch.ones(vocab, 1)
    if draft_vocab:
        drafter.draft_vocab = torch.tensor(draft_vocab)
    return drafter


NAN, INF = math.nan, math.inf
LOGITS = {
    "all equal": [0.5] * 40,
    "three levels": [float(i % 3) for i in range(70)],
    "ties with the fifth": [9.0, 8.0, 7.0] + [5.0] * 300 + [1.0, 8.0],
    "minus zero": [-0.0, 0.0, -0.0, 0.0, 1.0, -1.0],
    "one row": [2.0],
    "two rows": [1.0, 2.0],
    "fewer rows than beams": [0.25, -1.0, 0.5],
    "one NaN": [1.0, NAN, 3.0, 2.0] * 10,
    "only NaN": [NAN] * 50,
    "minus infinities": [-INF] * 30 + [1.0, 0.0] + [-INF] * 300,
    "only minus infinities": [-INF] * 33,
    "one infinity": [float(i) for i in range(600)] + [INF] + [0.0] * 10,
    "two infinities": [INF, 1.0, INF, 2.0, NAN, -INF],
    "only infinities": [INF] * 20,
    "largest floats": [3e38, -3e38, 1e9, -1e9, 0.0, 2e38, -1e10, 5.0],
    "kept below the filler": [0.0, -60000.0, -70000.0, -80000.0, -90000.0, -90000.0, -1e6],
    "steep": [-0.1 * i**1.5 for i in range(3000)],
}
