# SPDX-License-Identifier: Apache-2.0
"""A cost table, corrected by the steps that really ran.

A table knows the machine as it was at start-up, and nothing of scheduler, sampler and other
programs. What steps really take is fitted as

    seconds = speed * table(rows) + overhead + per_request * requests + trees

by least squares over the last steps, with weights that fade. Where steps are so alike that they do
not tell these apart, the table's own proportions hold, times a common factor: a machine that
becomes twice as slow changes no decision. A single step of absurd length (a suspended process) is
no evidence; several in a row are, and the fit starts again from them. A step far shorter than the
table allows is: other programs make a step longer, never shorter, so the table was measured beside
them, and its costs of so many rows come down.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vllm_redrafter.budget.costs import NO_DRAFT, CostTable, DraftShape, between, convex

FADE = 0.985  # of a step's weight, per step
FADE_BIASED = 0.8  # where steps have been longer, or shorter, than thought for a while
BIAS_RATE, BIASED = 0.2, 0.15
DRAFT_RATE = 0.1  # of an observed draft on the estimate
OUTLIER = math.log(2.5)  # further from the estimate than this is not believed at once
BELIEVED_AFTER = 5  # outliers in a row

# Steps between two fits, after the first ones.
SOLVE_EACH, SOLVE_EVERY = 32, 4

# How many steps' worth the prior is believed: speed, overhead, requests, trees.
PRIOR = np.array([1.0, 0.3, 0.3, 2.0])


class CostModel:
    """Seconds of a step and of a draft.

    Args:
        table: what was measured.
    """

    def __init__(self, table: CostTable) -> None:
        self.table = table
        # Times are fitted as multiples of one row's, so that the prior has a scale.
        self._unit = table.rows[0][1]
        self._outliers = 0
        self._drafts: dict[tuple[DraftShape, int], float] = {}
        self._forget(1.0)

    def _forget(self, factor: float) -> None:
        """Start again from the table times ``factor``."""
        self._squares = np.zeros((4, 4))
        self._products = np.zeros(4)
        self._seen, self._bias = 0, 0.0
        self._seconds, self._by_table = factor, 1.0
        self._solution = np.array([factor, 0.0, 0.0, 0.0])

    def step(
        self, rows: np.ndarray | float, requests: int, attended: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Seconds of one step without the draft.

        Args:
            rows: of the target, roots and nodes, any shape.
            requests: in the step. More rows than these mean that there are nodes: such a step is
                another one, with masks in its attention, a walk, KV moves.
            attended: tokens of context, summed over the rows.
        """
        by_table, trees = self._table(rows, attended), np.asarray(rows) > requests
        speed, overhead, per_request, of_trees = self._solution
        fitted = speed * by_table + overhead + per_request * requests / 8 + of_trees * trees
        # No fit makes a step cheaper than half of what its rows take by themselves.
        return self._unit * np.maximum(fitted, 0.5 * self._factor * by_table)

    @property
    def _factor(self) -> float:
        return self._seconds / self._by_table

    def _table(self, rows: np.ndarray | float, attended: np.ndarray | float) -> np.ndarray:
        seconds = between(self.table.rows, rows) + self.table.attention * np.asarray(attended)
        return seconds / self._unit

    def observe_step(self, rows: int, requests: int, attended: float, seconds: float) -> None:
        """One step without prompts took so long, the draft not among it."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        took, by_table = seconds / self._unit, float(self._table(rows, attended))
        off = math.log(seconds / float(self.step(rows, requests, attended)))
        if self._seen and off < -OUTLIER and rows > requests:
            self._lower(rows, seconds / self._factor - self.table.attention * attended)
            return
        if self._seen and abs(off) > OUTLIER:
            self._outliers += 1
            if self._outliers >= BELIEVED_AFTER:
                self._outliers = 0
                self._forget(took / by_table)
            return
        self._outliers = 0
        self._bias += BIAS_RATE * (off - self._bias)
        fade = FADE if abs(self._bias) < BIASED else FADE_BIASED
        # Before the first step the sums are the table's, which weighs nothing.
        fade = fade if self._seen else 0.0
        self._seen += 1
        self._seconds = fade * self._seconds + took
        self._by_table = fade * self._by_table + by_table
        features = np.array([by_table, 1.0, requests / 8, float(rows > requests)])
        self._squares = fade * self._squares + np.outer(features, features)
        self._products = fade * self._products + features * took
        if self._seen > SOLVE_EACH and self._seen % SOLVE_EVERY:
            return
        expected = np.array([self._factor, 0.0, 0.0, 0.0])
        self._solution = np.linalg.solve(
            self._squares + np.diag(PRIOR), self._products + PRIOR * expected
        )
        # A negative slope is noise: a row always takes some time.
        self._solution[0] = max(self._solution[0], 0.3 * self._factor)

    def _lower(self, rows: int, seconds: float) -> None:
        """The table's cost of so many rows is at most this, by a step that ran."""
        least = self.table.rows[0][1]
        if seconds < least / 2:
            return  # a clock that jumped
        # Fewer rows take no longer, and never less than the fewest.
        seconds = max(seconds, least)
        kept = [(at, min(old, seconds) if at <= rows else old) for at, old in self.table.rows]
        points = dict(kept) | {float(rows): seconds}
        self.table = replace(self.table, rows=convex(sorted(points.items())))

    def draft(self, shape: DraftShape, batch: int) -> float:
        """Seconds of one draft; 0 for none."""
        if shape == NO_DRAFT or shape not in self.table.drafts:
            return 0.0
        seconds = float(between(self.table.drafts[shape], batch))
        return seconds * math.exp(self._drafts.get((shape, batch.bit_length()), 0.0))

    def observe_draft(self, shape: DraftShape, batch: int, seconds: float) -> None:
        """One draft took so long."""
        if shape not in self.table.drafts or not (math.isfinite(seconds) and seconds > 0):
            return
        off = math.log(seconds / self.draft(shape, batch))
        key = shape, batch.bit_length()
        off = max(-OUTLIER, min(OUTLIER, off))
        self._drafts[key] = self._drafts.get(key, 0.0) + DRAFT_RATE * off
