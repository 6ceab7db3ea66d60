# SPDX-License-Identifier: Apache-2.0
"""One step of the beam search: from logits to the W best continuations of every request."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.ops import reference
from vllm_redrafter.ops.library import compiled_available, has_kernel


def beam_step(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    out_state: Tensor | None,
    logits: Tensor,
    beam_scores: Tensor,
    state: Tensor | None,
    draft_vocab: Tensor | None = None,
    top_k: int = 0,
) -> None:
    """Keep the W best of all W x V' continuations, best first.

    A continuation's score is its beam's plus its log-probability (``log_probabilities`` in
    ``drafter/beam_search.py``), in float32; ties go to the lowest parent, then to the lowest row of
    the head, on every device. Any logits are allowed: NaN and -inf count as the worst.

    A search writes each depth into its slice of ``[B, L, W]`` tensors. Parents are kept at every
    depth, so the history needs no reordering, and ``best`` trees find all that was kept.

    Args:
        tokens: ``[B, W]`` int64, written: ids of the target. Any strides, as for the next two.
        parents: ``[B, W]`` int64, written: the beam that each one continues.
        scores: ``[B, W]`` float32, written. May not share memory with ``beam_scores``.
        out_state: ``[B, W, H]``, written: each kept beam's state; None without states.
        logits: ``[B, W, V']`` float32, bfloat16 or float16, rows contiguous. Or ``[B, 1, V']``: the
            first step, where beams 1 and up are copies of beam 0 with one filler score, that of
            beam 1.
        beam_scores: ``[B, W]`` float32.
        state: ``[B, W or 1, H]`` any dtype, the states that the logits came from; None without.
        draft_vocab: ``[V']`` int64, the target's id of each row of the head; None: the row itself.
        top_k: renormalise each row over its k largest logits first; 0 is off. On CUDA W and top_k
            are at most 64.

    Raises:
        RuntimeError: arguments that do not fit each other (compiled operator).
    """
    operator = (
        torch.ops.redrafter.beam_step.default if has_kernel(logits.device) else reference.beam_step
    )
    operator(
        tokens, parents, scores, out_state, logits, beam_scores, state, draft_vocab, top_k
    )  # fmt: skip


if compiled_available():

    @torch.library.register_fake("redrafter::beam_step")
    def _(tokens: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""
