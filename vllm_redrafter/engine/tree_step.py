# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step hold trees: what the engines tell their attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Attribute under which an engine hangs a TreeStep on vLLM's attention metadata.
STEP_ATTRIBUTE = "redrafter_step"


@dataclass(frozen=True)
class TreeStep:
    """Which rows of one step our op computes.

    Attributes:
        request_index: int32 ``[R]``, row of the block table of each covered request.
        row_start: int32 ``[R]``, its first query row, the root.
        row_count: int32 ``[R]``, its query rows.
        context_lens: int32 ``[R]``, its cached tokens before the root.
        masks: int64 ``[T, words]``, which of its request's rows a row sees; T is at least the end
            of the last covered row and at most the step's rows.
        covers_all: no other rows are in this step, so vLLM's own kernel is not needed.
    """

    request_index: Tensor
    row_start: Tensor
    row_count: Tensor
    context_lens: Tensor
    masks: Tensor
    covers_all: bool
