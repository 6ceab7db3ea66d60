# SPDX-License-Identifier: Apache-2.0
"""The target's greedy tokens of some rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.ops.library import compiled_available, has_kernel


def argmax_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows].argmax(dim=-1)``, with no copy of the rows.

    The first of equal values, and NaN before every number, as torch says it. On a CPU torch takes
    several times as long as reading the rows does (benchmarks/ops); elsewhere torch's own is taken.

    Args:
        values: ``[R, V]`` float32, bfloat16 or float16, rows of any stride.
        rows: ``[B]`` int64 on that device.

    Returns:
        ``[B]`` int64.

    Raises:
        RuntimeError: dtypes or shapes that do not fit, or a row that is not there (on the CPU).
    """
    if values.device.type != "cpu" or not has_kernel(values.device):
        return values[rows].argmax(dim=-1)
    out = torch.empty(rows.shape[0], dtype=torch.int64)
    torch.ops.redrafter.argmax_rows.default(out, values, rows)
    return out


if compiled_available():

    @torch.library.register_fake("redrafter::argmax_rows")
    def _(out: Tensor, values: Tensor, rows: Tensor) -> None:
        """Nothing to compute: the result is written into an argument."""
