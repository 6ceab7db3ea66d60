# SPDX-License-Identifier: Apache-2.0
"""How many nodes each request of a batch may verify: as many as pay, over the whole batch.

All candidates compete, best first; K of them give B + their probabilities in expected tokens, and
take the time of a step of B + K rows. The K with the most tokens per second is taken, zero allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Below this a node never pays: its row costs more than so small a share of a step.
LEAST = 0.01

# Nodes must promise so much more than none: what no model of costs knows, such as the last
# requests of a batch that wait for each other, is a loss.
MARGIN = 1.03


@dataclass(frozen=True)
class Choice:
    """Attributes:
    counts: int64 ``[B]``, nodes of each request: its first candidates.
    tokens: expected tokens of the step.
    seconds: of the step with its draft.
    gain: times the tokens per second of the same step without nodes; 1 where none were chosen.
    """

    counts: np.ndarray
    tokens: float
    seconds: float
    gain: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


def choose(
    probabilities: np.ndarray, step_seconds: np.ndarray, other_seconds: float = 0.0
) -> Choice:
    """The number of nodes per request with the most expected tokens per second.

    Args:
        probabilities: ``[B, M]`` float, of each candidate's path, never rising along a row; 0
            where a request has or may have no more.
        step_seconds: ``[K + 1]`` float, a step with 0, 1, ... K nodes in all; no more than K are
            chosen.
        other_seconds: what the step takes besides, such as the draft that is made already.
    """
    batch, columns = probabilities.shape
    candidates = np.flatnonzero(probabilities.ravel() > LEAST)
    values = probabilities.ravel()[candidates]
    # Stable, so that of equal ones a parent stays before its child.
    order = np.argsort(-values, kind="stable")[: len(step_seconds) - 1]
    tokens = batch + np.concatenate(([0.0], np.cumsum(values[order])))
    seconds = step_seconds[: len(tokens)] + other_seconds
    rates = tokens / seconds
    nodes = int(np.argmax(rates))
    if rates[nodes] < MARGIN * rates[0]:
        nodes = 0
    counts = np.zeros(batch, dtype=np.int64)
    if nodes:
        counts += np.bincount(candidates[order[:nodes]] // columns, minlength=batch)
    gain = float(rates[nodes] / rates[0])
    return Choice(counts, float(tokens[nodes]), float(seconds[nodes]), gain)


def choose_alone(
    probabilities: np.ndarray, step_seconds: np.ndarray, other_seconds: float = 0.0
) -> np.ndarray:
    """``choose`` for P requests, each of which is the only one of its step.

    Args:
        probabilities: ``[P, M]``, as for ``choose``.
        step_seconds: ``[M + 1]``.

    Returns:
        int64 ``[P]``, nodes of each.
    """
    useful = np.where(probabilities > LEAST, probabilities, 0.0)
    tokens = 1 + np.cumsum(np.pad(useful, ((0, 0), (1, 0))), axis=1)
    rates = tokens / (step_seconds + other_seconds)
    nodes = rates.argmax(axis=1)
    best = np.take_along_axis(rates, nodes[:, None], axis=1)[:, 0]
    return np.where(best < MARGIN * rates[:, 0], 0, nodes)
