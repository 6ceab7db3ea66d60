# SPDX-License-Identifier: Apache-2.0
"""Inputs of one beam step, ordinary and not."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import FILLER_SCORE

# (name, batch, width, first step, vocabulary, top_k, dtype)
CASES = [
    ("ordinary", 3, 4, False, 300, 0, torch.float32),
    ("bfloat16, full of ties", 2, 8, False, 1100, 0, torch.bfloat16),
    ("float16", 2, 3, False, 90, 0, torch.float16),
    ("first step", 2, 6, True, 300, 0, torch.float32),
    ("first step, more beams than tokens", 2, 9, True, 4, 0, torch.float32),
    ("more beams than tokens", 2, 9, False, 4, 0, torch.float32),
    ("one beam", 3, 1, False, 50, 0, torch.float32),
    ("one token", 2, 3, False, 1, 0, torch.float32),
    ("top 50", 2, 4, False, 300, 50, torch.float32),
    ("top 3, fewer than beams", 2, 5, False, 60, 3, torch.float32),
    ("top 5 with ties at the fifth", 2, 4, False, 40, 5, torch.bfloat16),
    ("no request", 0, 4, False, 30, 0, torch.float32),
    ("several chunks", 1, 5, False, 5000, 0, torch.float32),
]

SPECIAL = ("none", "nan", "inf", "-inf", "all nan", "equal", "low scores")


def beam_case(
    batch: int, width: int, first: bool, vocab: int, dtype: torch.dtype, special: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, beam scores and states."""
    torch.manual_seed(seed)
    rows = 1 if first else width
    logits = torch.randn(batch, rows, vocab) * 3
    if special in ("nan", "inf", "-inf"):
        spots = torch.rand(logits.shape) < 0.1
        logits[spots] = float(special)
    elif special == "all nan":
        logits[:] = torch.nan
    elif special == "equal":
        logits[:] = 1.5
    scores = -torch.rand(batch, width).cumsum(1) * 2
    if special == "low scores":
        scores = scores * 1e4
    elif special == "equal":
        scores[:] = -1.0
    if first:
        scores[:] = FILLER_SCORE
        scores[:, 0] = 0.0
    return logits.to(dtype), scores, torch.randn(batch, rows, 5)


def run(operator, device: torch.device, case: tuple[Tensor, ...], vocab: Tensor | None, top_k: int):
    """tokens, parents, scores and states, from outputs with strides that were poisoned before."""
    logits, scores, state = (tensor.to(device) for tensor in case)
    batch, width = scores.shape
    history = [
        torch.full((batch, 3, width), 77, dtype=dtype, device=device)
        for dtype in (torch.int64, torch.int64, torch.float32)
    ]
    out_state = torch.full((batch, width, 5), torch.nan, device=device)
    out = [tensor[:, 1] for tensor in history]
    vocab = None if vocab is None else vocab.to(device)
    operator(*out, out_state, logits, scores, state, vocab, top_k)
    assert all((tensor[:, [0, 2]] == 77).all() for tensor in history)
    return [tensor.cpu() for tensor in (*out, out_state)]


def assert_like_the_twin(found: list[Tensor], wanted: list[Tensor]) -> None:
    for name, a, b in zip(("tokens", "parents"), found, wanted, strict=False):
        assert torch.equal(a, b), name
    # Sums of exponentials in another order: some units in the last place of a score.
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-6, atol=2e-6)
    assert torch.equal(found[3], wanted[3])
