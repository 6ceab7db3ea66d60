# SPDX-License-Identifier: Apache-2.0
"""What may come of a damaged file: a result, or one sentence."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any


class Outcomes:
    """Runs cases and keeps count.

    Args:
        errors: exception types whose message is a sentence for the user.

    Attributes:
        counts: cases by outcome: "loaded", or the exception's name.
    """

    longest_seconds = 5.0
    longest_message = 1200
    largest_growth = 400 << 20

    def __init__(self, *errors: type[Exception]) -> None:
        self._errors = errors
        self._before = _peak()
        self.counts: Counter[str] = Counter()

    def run(self, what: Any, case: Callable[[], Any]) -> Any:
        """The case's result, or None where it raised one of the errors.

        Raises:
            AssertionError: another exception, no sentence, or too long.
        """
        began = time.perf_counter()
        result, said = None, "loaded"
        try:
            result = case()
        except self._errors as error:
            said = type(error).__name__
            text = str(error)
            assert "\n" not in text and text.endswith((".", "?")), (what, text)
            assert len(text) <= self.longest_message, (what, text)
        except Exception as error:
            raise AssertionError(f"a bare {type(error).__name__}: {error}; case {what}") from error
        seconds = time.perf_counter() - began
        assert seconds < self.longest_seconds, (what, seconds)
        self.counts[said] += 1
        return result

    def check(self, least_loaded: int = 1, least_refused: int = 1) -> None:
        """Both outcomes occurred, and no case took much memory."""
        refused = self.counts.total() - self.counts["loaded"]
        assert self.counts["loaded"] >= least_loaded and refused >= least_refused, self.counts
        assert _peak() - self._before < self.largest_growth


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
