# SPDX-License-Identifier: Apache-2.0
"""Faults to put at the seams of drafting, and what must come of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_redrafter.engine.draft_guard import DraftGuard

# What PyTorch raises without memory, on a GPU and on a CPU, and everything else.
KINDS = {
    "error": lambda: RuntimeError("a fault put here"),
    "GPU memory": lambda: torch.OutOfMemoryError("CUDA out of memory, put here"),
    "memory": lambda: MemoryError("put here"),
}


class Fault:
    """Stands in for a function and raises at some calls.

    Args:
        function: what it stands in for.
        share: of the calls that fail.
        error: makes the exception.
    """

    def __init__(
        self, function: Callable[..., Any], share: float = 1.0, kind: str = "error", seed: int = 0
    ) -> None:
        self._function, self._share, self._error = function, share, KINDS[kind]
        self._source = random.Random(seed)
        self.calls = self.raised = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self._source.random() < self._share:
            self.raised += 1
            raise self._error()
        return self._function(*args, **kwargs)


@contextmanager
def fault_at(owner: Any, name: str, **fault: Any) -> Iterator[Fault]:
    """Attribute ``name`` of ``owner`` fails; what was there comes back afterwards."""
    own = name in vars(owner) if hasattr(owner, "__dict__") else False
    stands_in = Fault(getattr(owner, name), **fault)
    setattr(owner, name, stands_in)
    try:
        yield stands_in
    finally:
        if own:
            setattr(owner, name, stands_in._function)
        else:
            delattr(owner, name)


def guard_as_served(monkeypatch: Any, owner: Any, stats: Callable[[], Any]) -> None:
    """Give what drafts a guard as after its start: errors cost drafts, as in a server.

    Args:
        owner: has ``draft_guard``.
        stats: of ``DraftGuard``.
    """
    guard = DraftGuard(stats)
    guard.serving = True
    monkeypatch.setattr(owner, "draft_guard", guard)
