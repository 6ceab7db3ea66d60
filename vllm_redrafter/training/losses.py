# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear head, without ever holding all its logits.

With 5 offsets and 8,192 rows the logits of 512 positions take 84 MB, and automatic differentiation
would keep them several times over. Here a chunk of rows is multiplied, its gradient is formed at
once (softmax minus teacher, which needs nothing from later), and the logits are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Logits of one chunk: 16 MB in float32, near what caches hold.
_CHUNK_ENTRIES = 1 << 22


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    scale: Tensor,
    teacher: Tensor | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(scale * CE(target, softmax(x W^T)))``, soft or hard.

    Args:
        x: ``[N, X]`` float, what the head multiplies.
        weight: ``[V, X]`` float, the head; cast to the dtype of ``x`` for the products.
        rows: ``[N]`` int64: which row of ``teacher`` belongs to each x, or, without a teacher, the
            label (0 to V-1). Where ``scale`` is 0 any value will do.
        scale: ``[N]`` float32, each row's weight in the sum.
        teacher: ``[R, V]`` float, probabilities; rows may sum to less than 1 (a part of the
            distribution that the head does not cover), and are weighted accordingly.
        chunk: rows at a time; None: as many as make about four million logits.
        compiled: let torch.compile make one pass of the dozen over a chunk's logits.

    Returns:
        the loss (scalar, differentiable once in x and weight); each row's cross-entropy ``[N]``
        and argmax ``[N]`` int64, both without gradient.
    """
    chunk = chunk or max(16, _CHUNK_ENTRIES // weight.shape[0])
    return _LinearCrossEntropy.apply(
        x,
        weight,
        rows,
        scale,
        teacher,
        chunk,
        torch.is_grad_enabled(),
        _compiled_chunk_loss() if compiled else _chunk_loss,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rows: Tensor,
        scale: Tensor,
        teacher: Tensor | None,
        chunk: int,
        with_grad: bool,
        chunk_loss: Callable[..., tuple[Tensor | None, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        need_x = with_grad and ctx.needs_input_grad[0]
        need_w = with_grad and ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight) if need_w else None
        per_row = torch.empty(len(x), dtype=exact, device=x.device)
        best = torch.empty(len(x), dtype=torch.int64, device=x.device)
        # The caller may be under autocast; the types here are chosen one by one.
        with torch.autocast(x.device.type, enabled=False):
            head = weight.to(x.dtype)
            for start in range(0, len(x), chunk):
                here = slice(start, start + chunk)
                logits = x[here] @ head.T
                grad, per_row[here], best[here] = chunk_loss(
                    logits, rows[here].clamp(min=0), scale[here], teacher, need_x or need_w
                )
                if grad is None:
                    continue
                if grad_x is not None:
                    grad_x[here] = grad @ head
                if grad_w is not None:
                    grad_w += (grad.T @ x[here]).to(grad_w.dtype)
        ctx.save_for_backward(*(g for g in (grad_x, grad_w) if g is not None))
        ctx.need = (need_x, need_w)
        ctx.mark_non_differentiable(per_row, best)
        return (per_row * scale).sum(), per_row, best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        # A factor of shape [] does not change the type of a tensor.
        grads = [next(saved) * grad if need else None for need in ctx.need]
        return (*grads, None, None, None, None, None, None)


def _chunk_loss(
    logits: Tensor, rows: Tensor, scale: Tensor, teacher: Tensor | None, with_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradient of some logits ``[n, V]`` (in their type, scaled), their losses, their argmax."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = exact.logsumexp(-1)
    best = exact.argmax(-1)
    if teacher is None:
        per_row = normaliser - exact.gather(1, rows[:, None]).squeeze(1)
        if not with_grad:
            return None, per_row, best
        grad = (exact - normaliser[:, None]).exp()
        grad = grad.scatter_add(1, rows[:, None], grad.new_full((len(rows), 1), -1.0))
    else:
        wanted = teacher[rows].to(exact.dtype)
        mass = wanted.sum(-1)
        per_row = mass * normaliser - (wanted * exact).sum(-1)
        if not with_grad:
            return None, per_row, best
        grad = (exact - normaliser[:, None]).exp() * mass[:, None] - wanted
    return (grad * scale[:, None]).to(logits.dtype), per_row, best


@functools.cache
def _compiled_chunk_loss() -> Callable[..., tuple[Tensor | None, Tensor, Tensor]]:
    return torch.compile(_chunk_loss)


def why_not_compiled(device: torch.device) -> str | None:
    """What keeps torch.compile from working here, None if nothing does."""
    try:
        x = torch.zeros(2, 2, device=device)
        labels = torch.zeros(2, dtype=torch.int64, device=device)
        linear_cross_entropy(x, x, labels, x[0], compiled=True)
    except Exception as error:  # noqa: BLE001 - whatever the compiler's many layers raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
