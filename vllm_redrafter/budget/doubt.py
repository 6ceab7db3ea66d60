# SPDX-License-Identifier: Apache-2.0
"""Steps that test the costs: who always decides alike never sees what the other step takes."""

from __future__ import annotations

import numpy as np

from vllm_redrafter.budget.policy import Choice

# After so many steps without a node, nodes count as so much cheaper, and as cheaper still after so
# many more, until a step has some: a table that is wrong must not stay unnoticed, however wrong.
WITH_AFTER, CHEAPER, MOST_OFTEN = 64, 0.7, 12

# After so many steps with nodes, one has none, if nodes are thought to pay by less than CLOSE: what
# such a step takes would else be the fit's guess. It costs at most (CLOSE - 1) / WITHOUT_AFTER.
WITHOUT_AFTER, CLOSE = 24, 1.3


class Doubt:
    """Counts steps of one kind in a row."""

    def __init__(self) -> None:
        self._with, self._without = 0, 0

    def seconds(self, seconds: np.ndarray) -> np.ndarray:
        """``[K + 1]``, what steps with 0, 1, ... nodes count as."""
        cheaper = CHEAPER ** min(self._without // WITH_AFTER, MOST_OFTEN)
        return seconds[0] + cheaper * (seconds - seconds[0])

    def counts(self, choice: Choice) -> np.ndarray:
        """``[B]`` int64, the nodes of each request in this step."""
        if not choice.counts.any():
            self._with, self._without = 0, self._without + 1
            return choice.counts
        self._with, self._without = self._with + 1, 0
        if self._with <= WITHOUT_AFTER or choice.gain >= CLOSE:
            return choice.counts
        self._with = 0
        return np.zeros_like(choice.counts)
