# SPDX-License-Identifier: Apache-2.0
"""Text that goes in circles: one rule for what training drops and what reports set apart.

Greedy answers of a small model often end in a loop, which is easy to draft for: figures for them
say little about other text.
"""

from __future__ import annotations

from collections.abc import Sequence

# Above this share of repeated 8-grams an answer counts as looping.
LOOPING = 0.3


def repeated_share(token_ids: Sequence[int], n: int = 8) -> float:
    """Share of the n-grams that occurred before in the same text; 0.0 if there are none."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeats_more_than(token_ids: Sequence[int], share: float) -> bool:
    """Whether a larger share than ``share`` of the 8-grams occurred before."""
    # 30 % exactly is not more than 30 %, however the quotient is rounded.
    return repeated_share(token_ids) > share + 1e-9


def is_looping(token_ids: Sequence[int]) -> bool:
    """Whether an answer counts as looping in reports."""
    return repeats_more_than(token_ids, LOOPING)
