# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes on the device: events around the runner's calls.

A step begins when the runner begins it and ends when the next one begins, on the device's own time
line. Its parts: ``verify`` (inputs, the target's forward pass, logits), ``sample`` (sampler, walk),
``move`` (KV of the accepted path; in ``sample`` where a CUDA graph holds both), ``draft`` (the next
tree). ``decision`` is synthetic acceptance, inside of ``sample``. What is left is vLLM's own work
between the parts, or waiting for the host.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

PARTS = ("verify", "sample", "move", "draft", "decision")


class WallEvent:
    """``torch.cuda.Event`` for a rehearsal without a GPU."""

    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: WallEvent) -> float:
        return (other.at - self.at) * 1e3


@dataclass
class Step:
    """One engine step: how many rows of how many requests, and its events."""

    rows: int
    requests: int
    start: Any
    parts: dict[str, tuple[Any, Any]] = field(default_factory=dict)


class Clock:
    """Records spans; they are read when the device is done.

    Args:
        cuda: events of the device, else of the wall clock.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.steps: list[Step] = []
        self.on = False

    def event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True) if self.cuda else WallEvent()
        event.record()
        return event

    def step(self, rows: int, requests: int) -> None:
        """A step begins."""
        if self.on:
            self.steps.append(Step(rows, requests, self.event()))

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        """A part of the current step."""
        if not (self.on and self.steps):
            yield
            return
        begin = self.event()
        yield
        self.steps[-1].parts[part] = (begin, self.event())

    def until(self, part: str) -> None:
        """A part that began with the step ends here."""
        if self.on and self.steps:
            self.steps[-1].parts[part] = (self.steps[-1].start, self.event())

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Step]]:
        """Steps of the block, whole when it ends."""
        self.steps, self.on = [], True
        try:
            yield self.steps
        finally:
            self.on = False
            if self.cuda:
                torch.cuda.synchronize()


class Timed:
    """A callable object with its attributes, and a span around its calls."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._clock.until("verify")
        with self._clock.span("sample"):
            return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def attach(runner: Any, clock: Clock) -> None:
    """Put the spans around the calls of one Model Runner V2."""
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled:
            clock.step(sum(scheduled.values()), len(scheduled))
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model
    runner.sampler = Timed(runner.sampler, clock)
    if runner.speculator is None:
        return
    runner.rejection_sampler = Timed(runner.rejection_sampler, clock)
    for owner, method, part in (
        (runner.model_state, "postprocess_state", "move"),
        (runner.speculator, "propose", "draft"),
    ):
        setattr(owner, method, _spanned(getattr(owner, method), clock, part))


def _spanned(inner: Any, clock: Clock, part: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.span(part):
            return inner(*args, **kwargs)

    return call


def split(steps: list[Step], rows: int, requests: int, skip: int = 3) -> dict[str, Any]:
    """Medians in milliseconds over the steps of a full batch.

    Args:
        steps: of one recording.
        rows: of such a step.
        requests: of such a step.
        skip: first ones to leave out.

    Returns:
        ``steps`` (how many), ``step``, its ``quartiles``, every part, and ``rest``.

    Raises:
        ValueError: fewer than two such steps in a row.
    """
    whole = []
    for one, following in zip(steps, steps[1:], strict=False):
        if all((s.rows, s.requests) == (rows, requests) for s in (one, following)):
            parts = {name: a.elapsed_time(b) for name, (a, b) in one.parts.items()}
            whole.append({"step": one.start.elapsed_time(following.start), **parts})
    whole = whole[skip:]
    if len(whole) < 2:
        raise ValueError(
            f"only {len(whole)} of {len(steps)} steps had {requests} requests with {rows} rows in "
            "all; decode more tokens."
        )
    out: dict[str, Any] = {"steps": len(whole)}
    times = [one["step"] for one in whole]
    low, middle, high = statistics.quantiles(times, n=4)
    out |= {"step": middle, "quartiles": [low, high]}
    for name in PARTS:
        out[name] = statistics.median(one.get(name, 0.0) for one in whole)
    out["rest"] = out["step"] - sum(out[name] for name in PARTS if name != "decision")
    return out
