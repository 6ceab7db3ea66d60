# SPDX-License-Identifier: Apache-2.0
"""Beam search with a recurrent drafter.

Source: arXiv 2403.09919, section 3.2; ``Drafter.beam_search_candidates`` in
apple/ml-recurrent-drafter. There L counts the known token; here ``draft_length`` never does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.drafter.model import Drafter

# Score of the W-1 copies of the known token at the start, and the logit of entries outside the
# top k. Finite on purpose: -inf would turn sums into NaN.
FILLER_SCORE = -50_000.0

# What -inf and NaN count as, among logits and log-probabilities: below every filler, still finite.
FLOOR = -1e9


@dataclass(frozen=True)
class Beams:
    """What one draft keeps: the W best candidates of every depth, best first.

    Attributes:
        root: ``[B]`` int64, the known token that every beam starts with.
        tokens: ``[B, L, W]`` int64, the token of each kept candidate.
        parents: ``[B, L, W]`` int64, which candidate of the previous depth it extends
            (at depth 1: which copy of the root, 0 unless W exceeds the draft vocabulary).
        scores: ``[B, L, W]`` float32, sum of log-probabilities along the candidate's path.
    """

    root: Tensor
    tokens: Tensor
    parents: Tensor
    scores: Tensor

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def draft_length(self) -> int:
        return self.tokens.shape[1]

    @property
    def beam_width(self) -> int:
        return self.tokens.shape[2]

    def sequences(self) -> Tensor:
        """The surviving beams as Apple returns them: ``[B, W, L + 1]``, the root in column 0."""
        batch, length, width = self.tokens.shape
        out = self.tokens.new_empty(batch, width, length + 1)
        out[:, :, 0] = self.root[:, None]
        at = torch.arange(width, device=self.tokens.device).expand(batch, width)
        for depth in range(length, 0, -1):
            out[:, :, depth] = self.tokens[:, depth - 1].gather(1, at)
            at = self.parents[:, depth - 1].gather(1, at)
        return out


def greedy_chain(beams: Beams, draft_length: int) -> Beams:
    """What a beam of width 1 would have kept, as far as these beams hold it.

    Where a wider beam pruned the best child of the best candidate, fillers stand.

    Args:
        beams: of any width.
        draft_length: of the result, at most that of ``beams``.
    """
    batch = beams.batch_size
    at = torch.zeros(batch, 1, dtype=torch.int64, device=beams.tokens.device)
    lost = torch.zeros(batch, 1, dtype=torch.bool, device=beams.tokens.device)
    tokens, scores = [], []
    for depth in range(draft_length):
        if depth:
            # Ranks are best first: the first child is the best one.
            child = (beams.parents[:, depth] == at).long()
            lost = lost | (child.sum(1, keepdim=True) == 0)
            at = child.argmax(1, keepdim=True)
        tokens.append(beams.tokens[:, depth].gather(1, at))
        scores.append(beams.scores[:, depth].gather(1, at).masked_fill(lost, FILLER_SCORE))
    stacked = torch.stack(tokens, 1)
    return Beams(beams.root, stacked, torch.zeros_like(stacked), torch.stack(scores, 1))


def log_probabilities(logits: Tensor, top_k: int = 0) -> Tensor:
    """Log-softmax over the last axis in float32, optionally renormalised over the top k.

    Entries strictly below the k-th largest logit become ``FILLER_SCORE`` before the softmax (ties
    with the k-th stay), as ``warp_logits`` does in Apple's code with k = 50. The order matters:
    it changes the normaliser and thereby the ranking across beams. Logits are first brought into
    [FLOOR, -FLOOR], NaN counting as FLOOR, so that the result is finite for any input.
    """
    logits = torch.nan_to_num(logits.float(), nan=FLOOR, posinf=-FLOOR, neginf=FLOOR)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, FILLER_SCORE)
    return torch.log_softmax(logits, dim=-1).clamp(min=FLOOR)


def top_k_lowest_index(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, best first, ties by the lowest index.

    ``torch.topk`` leaves the order of ties open; integers that must be identical on every device
    cannot.

    Args:
        values: ``[B, M]`` without NaN.
        k: at most M.

    Returns:
        values ``[B, k]`` and their indices ``[B, k]`` int64.
    """
    smallest_kept = values.topk(k, dim=-1).values[:, -1:]
    picked = []
    for row, bound in zip(values, smallest_kept, strict=True):
        index = (row >= bound).nonzero().flatten()
        order = torch.sort(row[index], descending=True, stable=True).indices
        picked.append(index[order[:k]])
    indices = torch.stack(picked) if picked else values.new_empty(0, k, dtype=torch.int64)
    return values.gather(1, indices), indices


def check_settings(beam_width: int, draft_length: int, top_k: int) -> None:
    """Raise ValueError for a beam that cannot be: W or L below 1, or k below 0."""
    if beam_width < 1 or draft_length < 1 or top_k < 0:
        raise ValueError(
            f"beam_width {beam_width} and draft_length {draft_length} must be at least 1, and "
            f"top_k {top_k} at least 0."
        )


@torch.inference_mode()
def beam_search(
    drafter: Drafter,
    context: Tensor,
    token: Tensor,
    beam_width: int,
    draft_length: int,
    top_k: int | None = None,
) -> Beams:
    """Draft ``draft_length`` tokens with ``beam_width`` beams for every request of a batch.

    Each step scores all W x V' continuations by (beam score + log-probability), in float32 and
    without length normalisation, and keeps the W best; ties go to the lowest parent, then to the
    lowest row of the drafter's head. The first step expands copy 0 of the known token alone,
    because the other copies start at ``FILLER_SCORE``.

    Args:
        drafter: with its embedding bound.
        context: ``[B, H]``, the target's hidden state (after its final norm) that predicted
            ``token``.
        token: ``[B]`` int64, the known token: already chosen by the target, not yet its input.
        beam_width: W >= 1; may exceed the draft vocabulary (fillers then have scores near
            ``FILLER_SCORE``).
        draft_length: L >= 1 drafted tokens, never counting ``token``.
        top_k: renormalise every row over its k largest logits first; 0 is off, None is the
            drafter's own default (50 for Apple's checkpoints, else what its config says, else 0).

    Returns:
        Beams.

    Raises:
        ValueError: ``beam_width`` or ``draft_length`` below 1, or ``top_k`` below 0.
    """
    if top_k is None:
        top_k = drafter.config.defaults.get("top_k", 0)
    check_settings(beam_width, draft_length, top_k)
    batch, width = token.shape[0], beam_width
    context = context[:, None, :].expand(batch, width, -1)
    last = token[:, None].expand(batch, width)
    state = drafter.initial_state(batch, width)
    scores = torch.full((batch, width), FILLER_SCORE, device=token.device)
    scores[:, 0] = 0.0

    kept_tokens, kept_parents, kept_scores = [], [], []
    for _ in range(draft_length):
        logits, state = drafter(context, last, state)
        vocab = logits.shape[-1]
        candidates = scores[:, :, None] + log_probabilities(logits, top_k)
        scores, flat = top_k_lowest_index(candidates.flatten(1), width)
        parents = flat // vocab
        last = drafter.to_target_ids(flat % vocab)
        # The new state belongs to the beam it was computed for: reorder after the selection.
        state = state.gather(1, parents[:, :, None].expand_as(state))
        kept_tokens.append(last)
        kept_parents.append(parents)
        kept_scores.append(scores)
    return Beams(
        root=token,
        tokens=torch.stack(kept_tokens, 1),
        parents=torch.stack(kept_parents, 1),
        scores=torch.stack(kept_scores, 1),
    )
