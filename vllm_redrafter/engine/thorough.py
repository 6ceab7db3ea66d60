# SPDX-License-Identifier: Apache-2.0
"""Checks that cost time, for whoever suspects an error: ``VLLM_REDRAFTER_CHECK=1``.

What they find is about verification, where going on would give wrong tokens: they end the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_redrafter.ops.move_kv import MoveKV

SWITCH = "VLLM_REDRAFTER_CHECK"


class CheckFailed(RuntimeError):
    """Something that must hold does not."""


def thorough() -> bool:
    """Whether the checks are on; asked once, when an engine starts."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


def require(holds: bool, what: str) -> None:
    """Raise ``CheckFailed`` unless it holds."""
    if not holds:
        raise CheckFailed(f"{SWITCH} found that {what}; please report this.")


def check_logits(logits: Tensor) -> None:
    """No row that is walked on comes of a NaN in attention; -inf is a masked token's."""
    bad = logits.isnan().any(-1).nonzero().flatten().tolist()
    require(not bad, f"the logits of rows {bad} of the step hold NaN")


def checked_move(
    movers: Sequence[MoveKV], slots: Sequence[tuple[Tensor, Tensor]], move: Callable[[], None]
) -> None:
    """Run ``move``, which must bring the KV of the accepted paths behind their roots.

    Args:
        movers: of every KV cache group.
        slots: of every KV cache group, from where to where; pairs with a negative slot stay.
    """
    require(len(movers) == len(slots), f"{len(slots)} KV cache groups have {len(movers)} movers")
    real = [tuple(side[(a >= 0) & (b >= 0)] for side in (a, b)) for a, b in slots]
    before = [mover.read(source) for mover, (source, _) in zip(movers, real, strict=True)]
    move()
    after = [mover.read(target) for mover, (_, target) in zip(movers, real, strict=True)]
    for group, (old, new) in enumerate(zip(before, after, strict=True)):
        equal = all(map(torch.equal, old, new))
        require(equal, f"KV of accepted tokens is not where it was moved to, in group {group}")
