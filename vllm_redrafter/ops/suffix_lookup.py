# SPDX-License-Identifier: Apache-2.0
"""Continuations of a request's own text, on the device that the text is on."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.lookup import suffix as twin
from vllm_redrafter.lookup.suffix import (
    LONGEST_MATCH,
    MAX_CHAINS,
    MAX_DEPTH,
    WINDOW,
    Chains,
    check_sizes,
)
from vllm_redrafter.ops.library import compiled_available, has_kernel

# Occurrences that the CUDA kernel can follow.
MAX_CUDA_WINDOW = 64


def suffix_lookup(
    text: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    chains: int = MAX_CHAINS,
    depth: int = MAX_DEPTH,
    window: int = WINDOW,
    longest: int = LONGEST_MATCH,
) -> Chains:
    """``vllm_redrafter.lookup.suffix.suffix_lookup`` in one compiled call.

    On CUDA nothing is read back, so the call can be captured in a CUDA graph. ``text`` may then be
    host memory that is mapped into the device: each token is read about once, from the end on.

    Args:
        text: ``[R, S]`` int32 on any device, rows of any stride; on the CPU without gaps within a
            row. Tokens before a start and from an end on have no influence.
        slots: ``[B]`` int32 on that device.
        starts: ``[B]`` int32 on that device.
        ends: ``[B]`` int32 on that device.
        chains: C >= 1.
        depth: D >= 1.
        window: at least 1, on CUDA at most ``MAX_CUDA_WINDOW``.
        longest: at least 1.

    Returns:
        ``Chains``, on the same device. Integers are the twin's, scores too, but on CUDA up to
        rounding.

    Raises:
        ValueError: a number below 1.
        RuntimeError: dtypes or shapes that do not fit, or a window too large for CUDA (compiled
            operator); on the CPU also a slot that is no row of the text, or a start and end that
            are not 0 <= start <= end <= S. On CUDA such a request finds nothing.
    """
    check_sizes(chains, depth, window, longest)
    device, batch = text.device, slots.shape[0]
    sizes = {"chains": chains, "depth": depth, "window": window, "longest": longest}
    if not has_kernel(device):
        here = (tensor.cpu() for tensor in (text, slots, starts, ends))
        found = twin.suffix_lookup(*here, **sizes)
        return Chains(**{name: tensor.to(device) for name, tensor in vars(found).items()})
    tokens = torch.empty(batch, chains, depth, dtype=torch.int64, device=device)
    matched = torch.empty(batch, chains, dtype=torch.int64, device=device)
    scores = torch.empty(batch, chains, depth, dtype=torch.float32, device=device)
    torch.ops.redrafter.suffix_lookup.default(
        tokens, matched, scores, text, slots, starts, ends, window, longest
    )
    return Chains(tokens=tokens, matched=matched, scores=scores)


if compiled_available():

    @torch.library.register_fake("redrafter::suffix_lookup")
    def _(tokens: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""
