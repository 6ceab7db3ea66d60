# SPDX-License-Identifier: Apache-2.0
"""The worker's end: what was counted since the last message, put on a step's output.

A message goes out once a second, when the engine runs out of work, and where a request ends (if
the runner knows). Between them a step pays for a look at the clock. Whatever fails here ends the
metrics, is logged once, and leaves the step's output as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.v1.outputs import AsyncModelRunnerOutput, ECConnectorOutput, ModelRunnerOutput

from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.prometheus.catalog import COUNTERS, OFF

logger = logging.getLogger("vllm.vllm_redrafter")

# Our key in the dictionary that travels.
KEY = "redrafter"

# Seconds between two messages while requests run.
EVERY = 1.0

# Counters that may still be on their way to the host; the call waits for them.
Counted = Callable[[], ReDrafterStats]
# {name: {label value: what was added}}
Message = dict[str, dict[str, float]]


class Changes:
    """Turns counters into what was added to them since the last call."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], float] = {}

    def since_last(self, stats: ReDrafterStats, drafting_off: bool) -> Message:
        """Only what changed; empty if nothing did. A counter that fell was reset, and is told anew.

        Args:
            drafting_off: told as it is, once it changed.
        """
        message: Message = {}
        for metric in COUNTERS:
            for label, value in metric.read(stats).items():
                key = metric.name, label
                value, told = float(value), self._told.get(key, 0.0)
                if value != told:
                    added = value - told if value > told else value
                    message.setdefault(metric.name, {})[label] = added
                    self._told[key] = value
        off = float(drafting_off)
        if off != self._told.get((OFF, ""), 0.0):
            message[OFF] = {"": off}
            self._told[OFF, ""] = off
        return message


class MetricsSender:
    """Puts messages on the outputs of a worker.

    Args:
        count: starts copying the counters to the host, in the order of the device's work.
        drafting_off: whether drafting was given up.
        urgent: whether the step that just ran should not wait for the next second.
        now: seconds, never falling.
    """

    def __init__(
        self,
        count: Callable[[], Counted],
        drafting_off: Callable[[], bool],
        urgent: Callable[[], bool] = lambda: False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count, self._drafting_off, self._urgent, self._now = count, drafting_off, urgent, now
        self._changes = Changes()
        self._due = now()
        self._counted: Counted | None = None
        self._broken = False

    def step_begins(self, idle: bool) -> None:
        """Before the step's own work, so that what is copied does not wait for it.

        Args:
            idle: the step has no tokens: requests ended, and others may be a long time coming.
        """
        if self._broken:
            return
        try:
            now = self._now()
            if idle or now >= self._due:
                self._due = now + EVERY
                self._counted = self._count()
        except Exception:
            self._give_up()

    def carry(self, output: Any) -> Any:
        """``output`` of the worker, with a message on it if it is time for one.

        Args:
            output: a ``ModelRunnerOutput``, an ``AsyncModelRunnerOutput``, or None, of a step that
                goes on.
        """
        if output is None or self._broken:
            return output
        try:
            if self._counted is None and not self._urgent():
                return output
            counted, self._counted = self._counted or self._count(), None
            if isinstance(output, AsyncModelRunnerOutput):
                return _Carrying(output, lambda finished: self._put(finished, counted))
        except Exception:
            self._give_up()
            return output
        return self._put(output, counted)

    def _put(self, output: Any, counted: Counted) -> Any:
        """May run in the thread that waits for a step's results."""
        try:
            message = self._changes.since_last(counted(), self._drafting_off())
            if not message:
                return output
            stats = ECConnectorStats(data={KEY: message})
            # Copies vLLM's shared empty output.
            return ModelRunnerOutput.with_ec_conn_output(
                output, ECConnectorOutput(ec_connector_stats=stats)
            )
        except Exception:
            self._give_up()
            return output

    def _give_up(self) -> None:
        self._broken = True
        logger.exception(
            "ReDrafter's metrics stop here (redrafter_* at /metrics); requests are not affected."
        )


class _Carrying(AsyncModelRunnerOutput):
    """Another output that is still being computed, with a message for when it is there."""

    def __init__(self, output: Any, put: Callable[[Any], Any]) -> None:
        self._output, self._put = output, put

    def get_output(self) -> Any:
        return self._put(self._output.get_output())

    def get_kv_connector_output(self) -> Any:
        """Of vLLM 0.33: what is left of a step that failed."""
        return self._output.get_kv_connector_output()
