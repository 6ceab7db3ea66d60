# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, from its start to the next: scheduler and sampler included."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass
class Timed:
    """A step of decoding.

    Attributes:
        rows: of the target.
        requests: in the step.
        attended: tokens of context, summed over the rows.
        draft_seconds: that the draft behind it took.
    """

    rows: int
    requests: int
    attended: float
    draft_seconds: float = 0.0


class StepClock:
    """Times steps that the engine does one after another.

    Args:
        now: seconds, never falling.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began: float | None = None
        self._requests: list[str] = []
        self._running: Timed | None = None
        self.timed: Timed | None = None

    def lap(self, scheduled: Collection[str]) -> float | None:
        """A step begins; seconds since the one before it began, which ``timed`` then describes.

        None if that one held prompts, or if the engine may have waited for work in between: none
        of its requests runs on.

        Args:
            scheduled: the requests of the step that begins.
        """
        now, began = self._now(), self._began
        self.timed, self._running, self._began = self._running, None, now
        if self.timed is None or began is None:
            return None
        runs_on = any(request in scheduled for request in self._requests)
        return now - began if runs_on else None

    def start(self, requests: list[str], tokens: int, logits_rows: int, attended: float) -> None:
        """What the step that began consists of.

        Args:
            requests: its requests.
            tokens: scheduled.
            logits_rows: of them, roots and nodes; fewer where there are prompts.
            attended: see ``Timed``.
        """
        self._requests = requests
        timed = Timed(logits_rows, len(requests), attended)
        self._running = timed if tokens == logits_rows else None

    def drafted(self, seconds: float) -> None:
        """The draft in the step that runs took so long."""
        if self._running is not None:
            self._running.draft_seconds = seconds
