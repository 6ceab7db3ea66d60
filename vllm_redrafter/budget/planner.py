# SPDX-License-Identifier: Apache-2.0
"""With which beam width and length the drafter runs, or whether it runs at all.

That has to be decided before its candidates are known. What smaller drafts would have given can be
read off a full one, so full drafts are kept for a while, and the kind whose candidates would pay
best for a batch of the present size is taken. Where that is not the full one, a full draft is made
now and then, or nothing would be known of the text that runs now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vllm_redrafter.budget.costs import DraftShape

KEPT, KEPT_BATCHES = 48, 3  # requests' candidates, or so many batches' where that is more
ENOUGH = 24  # of them before anything is decided
EVERY = 16  # steps between two decisions
MARGIN = 1.01  # another kind must be so much better: no turning to and fro between equals
FULL_AFTER, FULL_AT_LEAST_AFTER = 48, 192  # steps; doubled by every look that changes nothing


class DraftPlanner:
    """Chooses among kinds of drafts.

    Args:
        shapes: the kinds, (W, L) each, the full one first.
        step_seconds: (requests, kind) -> ``[K + 1]`` seconds of a step with 0, 1, ... nodes, the
            draft of that kind included.
    """

    def __init__(
        self,
        shapes: Sequence[DraftShape],
        step_seconds: Callable[[int, DraftShape], np.ndarray],
    ) -> None:
        self.shapes = list(shapes)
        self._step_seconds = step_seconds
        self._kept: dict[DraftShape, np.ndarray] = {}
        self._current = self.shapes[0]
        # Whether the full draft planned last is only to see what it would give.
        self.looking = False
        self._batch, self._steps, self._since_full, self._full_after = 0, 0, 0, FULL_AFTER

    def plan(self, batch: int) -> DraftShape:
        """The kind of the next draft, for so many requests."""
        full = self.shapes[0]
        self._steps += 1
        self._since_full += 1
        if len(self._kept.get(full, ())) < ENOUGH:
            return full
        if batch.bit_length() != self._batch.bit_length() or self._steps % EVERY == 0:
            self._decide(batch)
        self.looking = self._current != full and self._since_full > self._full_after
        if self.looking:
            self._since_full = 0
            self._full_after = min(2 * self._full_after, FULL_AT_LEAST_AFTER)
            return full
        return self._current

    def _decide(self, batch: int) -> None:
        self._batch = batch
        rates = {
            shape: best_rate(self._kept[shape], batch, self._step_seconds(batch, shape))
            for shape in self.shapes
        }
        best = max(self.shapes, key=rates.__getitem__)
        if rates[best] > MARGIN * rates[self._current]:
            self._current, self._full_after = best, FULL_AFTER

    def observe(self, probabilities: Mapping[DraftShape, np.ndarray]) -> None:
        """What a full draft gave, and what each smaller one would have given.

        Args:
            probabilities: by kind ``[B, M]``, as for ``policy.choose``; of the same requests.
        """
        for shape, new in probabilities.items():
            kept = self._kept.get(shape)
            most = max(KEPT, KEPT_BATCHES * len(new))
            self._kept[shape] = (new if kept is None else np.concatenate([new, kept]))[:most]


def best_rate(probabilities: np.ndarray, batch: int, step_seconds: np.ndarray) -> float:
    """Tokens per second with the best number of nodes, averaged over batches of such requests.

    Args:
        probabilities: ``[R, M]``, of requests that are like those of the batch.
        batch: requests of one step.
        step_seconds: ``[K + 1]``, as for ``policy.choose``.
    """
    groups = max(1, len(probabilities) // batch)
    rows = probabilities[np.arange(groups * batch) % len(probabilities)]
    flat = -np.sort(-rows.reshape(groups, -1), axis=1)[:, : len(step_seconds) - 1]
    tokens = batch + np.cumsum(np.pad(flat, ((0, 0), (1, 0))), axis=1)
    seconds = step_seconds[: tokens.shape[1]]
    nodes = np.argmax(tokens / seconds, axis=1)
    return float(tokens[np.arange(groups), nodes].sum() / seconds[nodes].sum())


def draft_shapes(beam_width: int, draft_length: int) -> list[DraftShape]:
    """The kinds that are worth a try for a drafter whose full draft this is, that one first."""
    shapes = [(beam_width, draft_length), (1, draft_length), (1, 1), (0, 0)]
    return list(dict.fromkeys(shapes))
