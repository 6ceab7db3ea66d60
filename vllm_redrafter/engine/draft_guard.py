# SPDX-License-Identifier: Apache-2.0
"""Drafting is optional: what goes wrong there costs a draft, never an answer and never the server.

Only what a draft is made of is guarded: the drafter, the lookup, the trees, the budget and what it
learns. Errors while a tree is verified or its KV moves end the engine, because wrong tokens are
worse than none; so do errors in messages between ranks, of which no rank may be left out.

With tensor parallelism every rank guards its own draft and takes part in every message, whatever
became of the draft. The first rank's trees are everybody's, and so is its word that drafting is
over: no rank stops by itself to send or to wait.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from vllm_redrafter.engine.metrics import ReDrafterStats

logger = logging.getLogger("vllm.vllm_redrafter")

Result = TypeVar("Result")

# A fault that comes back at every step is no accident, and every step would pay for it.
ERRORS_IN_A_ROW = 10


class DraftGuard:
    """Keeps errors of drafting from everything else.

    Args:
        stats: counters.

    Attributes:
        serving: False until the engine has started: up to then errors are raised, so that what
            never worked is seen at once.
        gave_up: this rank drafts no more.
        off: nobody does.
    """

    def __init__(self, stats: Callable[[], ReDrafterStats]) -> None:
        self._stats = stats
        self.serving = self.gave_up = self.off = False
        self._in_a_row: Counter[str] = Counter()
        self._logged: set[tuple[str, type]] = set()

    def attempt(self, part: str, work: Callable[[], Result], otherwise: Result) -> Result:
        """The result of ``work``, or ``otherwise`` if it raised.

        Args:
            part: what is tried, to be counted and logged by.
        """
        if not self.serving:
            return work()
        before = self._in_a_row[part]
        try:
            result = work()
        except Exception as error:
            self.failed(part, error)
            return otherwise
        if self._in_a_row[part] == before:
            self._in_a_row[part] = 0
        return result

    def failed(self, part: str, error: Exception) -> None:
        """Count and log an error; give up after too many in a row in one part.

        Raises:
            the error, if the engine does not serve yet.
        """
        if not self.serving:
            raise error
        self._stats().draft_errors[part] += 1
        self._in_a_row[part] += 1
        if (part, type(error)) not in self._logged:
            self._logged.add((part, type(error)))
            logger.error(
                "ReDrafter failed at %s; requests go on without this draft, and their answers are "
                "the same. Further errors of this kind are only counted (draft_errors in "
                "redrafter_stats).",
                part, exc_info=error,
            )  # fmt: skip
        if self._in_a_row[part] >= ERRORS_IN_A_ROW and not self.gave_up:
            self.gave_up = True
            logger.error(
                "ReDrafter drafts no more on this rank until the engine is restarted: %d errors in "
                "a row at %s, the last one %s: %s. Answers stay the same, without the speed-up.",
                self._in_a_row[part], part, type(error).__name__, error,
            )  # fmt: skip

    def agree(self, first_gave_up: bool) -> None:
        """What the first rank says holds for all of them; a single rank asks itself."""
        if first_gave_up and not self.gave_up:
            logger.error("ReDrafter drafts no more: the first tensor-parallel rank gave up.")
        self.off = self.off or first_gave_up
