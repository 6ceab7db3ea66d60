# SPDX-License-Identifier: Apache-2.0
"""How long a benchmark will still take, from what has run so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_redrafter.bench.batches import Batches, full_batches

# A batch of so many takes twice as long as one request: a guess until a larger one has run.
_DOUBLE = 24


def call_weight(batch_size: int, max_tokens: int) -> float:
    """About how long a call takes, in units of one token of one request."""
    return max_tokens * (1 + batch_size / _DOUBLE)


def planned(what: Batches) -> dict[tuple[str, int], tuple[int, float]]:
    """Timed calls, and the weight of one, by set and batch size; all parts together."""
    engines = len(what.variants) + len(what.parts)
    found = {}
    for asked in what.sets:
        for size in what.batch_sizes:
            count = len(asked.token_ids)
            if what.queue and size > 1:
                groups, weight = 1, call_weight(size, what.settings.max_tokens) * count / size
            else:
                groups = count if what.queue else len(full_batches(asked.token_ids, size)) // size
                weight = call_weight(size, what.settings.max_tokens)
            found[asked.name, size] = (groups * what.settings.rounds * engines, weight)
    return found


@dataclass
class Work:
    """What is to be done, and how far it is.

    Args:
        calls: of `planned`.
        starts: engines and servers that will be started.
        server_seconds: of `Rates.expected_seconds`.
        end: ``time.monotonic()`` at which the time is up; None: never.
        clock: seconds.
    """

    calls: dict[tuple[str, int], tuple[int, float]]
    starts: int
    server_seconds: float = 0.0
    end: float | None = None
    clock: Callable[[], float] = time.monotonic
    _done: dict[tuple[str, int], int] = field(default_factory=dict)
    _units: float = 0.0
    _unit_seconds: float = 0.0
    _started: int = 0
    _start_seconds: float = 0.0
    _since: float | None = None
    _server_left: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._server_left = self.server_seconds

    @property
    def total(self) -> int:
        """Timed calls in all."""
        return sum(count for count, _ in self.calls.values())

    @property
    def done(self) -> int:
        """Timed calls that are over."""
        return sum(self._done.values())

    def begin(self) -> None:
        """Something that takes time begins now."""
        self._since = self.clock()

    def started(self) -> None:
        """An engine is up, that was started at the last `begin`."""
        self._started += 1
        self._start_seconds += self._elapsed()

    def ran(self, asked: str, size: int, calls: int) -> None:
        """So many calls of one comparison are over; time since the last `begin` is theirs."""
        new = calls - self._done.get((asked, size), 0)
        if new <= 0:
            self.begin()
            return
        self._done[asked, size] = calls
        self._units += new * self.calls[asked, size][1]
        self._unit_seconds += self._elapsed()
        self.begin()

    def served(self, seconds: float) -> None:
        """So many of the server seconds are over."""
        self._server_left = max(0.0, self._server_left - seconds)

    def seconds_left(self) -> float | None:
        """The estimate; None before the first call has run."""
        until = None if self.end is None else max(0.0, self.end - self.clock())
        if not self._units:
            return until
        units = sum(
            (count - self._done.get(key, 0)) * weight for key, (count, weight) in self.calls.items()
        )
        left = units * self._unit_seconds / self._units + self._server_left
        if self._started:
            left += max(0, self.starts - self._started) * self._start_seconds / self._started
        return left if until is None else min(left, until)

    def _elapsed(self) -> float:
        return 0.0 if self._since is None else self.clock() - self._since


def in_words(seconds: float | None) -> str:
    """``"about 4 min left"``; "" for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"
