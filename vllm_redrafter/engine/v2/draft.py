# SPDX-License-Identifier: Apache-2.0
"""The beam search on the target's device, without a host read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams, check_settings
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops.beam_step import beam_step
from vllm_redrafter.ops.draft import CompiledDraft

# (context [B, H], known tokens [B] int64) -> the drafted beams.
Draft = Callable[[Tensor, Tensor], Beams]


def make_draft(drafter: Drafter, beam_width: int, draft_length: int, top_k: int) -> Draft:
    """The compiled draft, or ``LayerwiseDraft`` where ``CompiledDraft`` says that it cannot be.

    That is without the compiled library, on a device that it has no kernels for, and for settings
    or dtypes beyond them. In the last case ``CompiledDraft``'s own twin would do, but for its reads
    of the device.

    Args:
        drafter: with its embedding bound. On a CPU the compiled form takes its weights.
        beam_width: W >= 1.
        draft_length: L >= 1.
        top_k: renormalise over the k largest logits first; 0 is off.

    Raises:
        ValueError: a setting is out of range, or the embedding does not fit the drafter.
    """
    compiled = CompiledDraft(
        drafter,
        beam_width=beam_width,
        draft_length=draft_length,
        top_k=top_k,
        take_weights=True,
    )
    if compiled.compiled:
        return compiled
    return LayerwiseDraft(drafter, beam_width, draft_length, top_k)


class LayerwiseDraft:
    """``drafter.beam_search.beam_search`` with the drafter's layers and one ``beam_step`` a depth.

    Args: as for ``make_draft``.
    """

    def __init__(self, drafter: Drafter, beam_width: int, draft_length: int, top_k: int) -> None:
        check_settings(beam_width, draft_length, top_k)
        self.drafter = drafter
        self.beam_width, self.draft_length, self.top_k = beam_width, draft_length, top_k

    @torch.inference_mode()
    def __call__(self, context: Tensor, token: Tensor) -> Beams:
        """Draft for a batch.

        Args:
            context: ``[B, H]``, the hidden states that predicted ``token``.
            token: ``[B]`` int64, the known tokens.
        """
        drafter, device = self.drafter, token.device
        batch, width = token.shape[0], self.beam_width
        shape = (batch, self.draft_length, width)
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
        parents = torch.empty(shape, dtype=torch.int64, device=device)
        scores = torch.empty(shape, dtype=torch.float32, device=device)
        # The first step expands one copy of the known token; the others only have filler scores.
        last, state = token[:, None], drafter.initial_state(batch, 1)
        beam_scores = torch.full((batch, width), FILLER_SCORE, device=device)
        beam_scores[:, 0] = 0.0
        context = context[:, None, :]
        for depth in range(self.draft_length):
            rows = last.shape[1]
            logits, state = drafter(context.expand(batch, rows, -1), last, state)
            kept = torch.empty(batch, width, state.shape[-1], dtype=state.dtype, device=device)
            beam_step(
                tokens[:, depth], parents[:, depth], scores[:, depth], kept,
                logits.contiguous(), beam_scores, state.contiguous(), drafter.draft_vocab,
                self.top_k,
            )  # fmt: skip
            last, state, beam_scores = tokens[:, depth], kept, scores[:, depth].contiguous()
        return Beams(root=token, tokens=tokens, parents=parents, scores=scores)
