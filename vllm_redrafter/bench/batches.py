# SPDX-License-Identifier: Apache-2.0
"""The same engines at several batch sizes and on several sets of prompts, in turn.

All engines are alive together as far as memory allows, plain vLLM in every part, and stay up from
one batch size to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_redrafter.bench import variants as kinds
from vllm_redrafter.bench.compare import Comparison, Progress, compare
from vllm_redrafter.bench.engines import Engines, Settings
from vllm_redrafter.bench.prompts import PromptSet
from vllm_redrafter.options import is_method


@dataclass(frozen=True)
class Batches:
    """What is to be measured.

    Attributes:
        target: as `compare` takes it.
        variants: speculative_config of what is compared with plain vLLM, by name.
        sets: of prompts.
        batch_sizes: requests that run together.
        settings: what all engines have in common; batch size, temperature and `ignore_eos` come
            from the others.
        at_once: engines alive at the same time, plain vLLM among them; at least 2.
        queue: all prompts are given in one call of which so many run at a time, as in `vllm bench
            throughput`; else so many start together and the last one to end is waited for.
    """

    target: str
    variants: dict[str, dict[str, Any]]
    sets: Sequence[PromptSet]
    batch_sizes: Sequence[int]
    settings: Settings
    at_once: int
    queue: bool = False
    parts: list[dict[str, dict[str, Any] | None]] = field(init=False)

    def __post_init__(self) -> None:
        others, size = list(self.variants.items()), max(1, self.at_once - 1)
        parts = [{kinds.PLAIN: None, **dict(others[at : at + size])}
                 for at in range(0, len(others), size)]  # fmt: skip
        object.__setattr__(self, "parts", parts)

    @property
    def largest(self) -> int:
        """The largest batch."""
        return max(self.batch_sizes)


def measure(
    what: Batches,
    end: float | None = None,
    report: Callable[[int, PromptSet], Progress] = lambda size, asked: lambda *progress: None,
    starting: Callable[[str], None] = lambda text: None,
    failed: Callable[[str, str], None] = lambda variant, why: None,
) -> Iterator[tuple[PromptSet, int, Comparison]]:
    """A set, a batch size and their comparison; several where not all engines fit together.

    Args:
        end: nothing starts after this ``time.monotonic()``. What is left of the time is shared
            equally among what is left to do.
        report: gives the progress callback of one comparison.
        starting: called with what is started.
        failed: called with a variant of another method than ReDrafter that does not start here,
            and what it said: vLLM has not every method for every platform and target.

    Raises:
        EngineFailed: an engine did not start or died.
    """
    left = len(what.parts) * len(what.batch_sizes) * len(what.sets)
    for part in what.parts:
        # Queued requests are held back by the engine, which is told how many at its start.
        for sizes in [[size] for size in what.batch_sizes] if what.queue else [what.batch_sizes]:
            if is_over(end):
                return
            others = [n for n, config in part.items()
                      if config and not is_method(config.get("method"))]  # fmt: skip
            with Engines(
                what.target, part, what.settings, max(sizes), starting, others
            ) as engines:
                for name, why in engines.failed.items():
                    failed(name, why)
                running = {n: config for n, config in part.items() if n not in engines.failed}
                if len(running) == 1:
                    continue
                for size, asked in ((s, a) for s in sizes for a in what.sets):
                    if is_over(end):
                        return
                    prompts, settings = arranged(what, asked, size)
                    yield asked, size, compare(
                        what.target, running, prompts, settings,
                        progress=report(size, asked), engines=engines,
                        deadline=None if end is None
                        else time.monotonic() + (end - time.monotonic()) / left,
                    )  # fmt: skip
                    left -= 1


def arranged(what: Batches, asked: PromptSet, size: int) -> tuple[list[list[int]], Settings]:
    """The prompts of one comparison, and its settings."""
    settings = replace(
        what.settings, temperature=asked.temperature, ignore_eos=asked.ignore_eos, batch_size=size
    )
    if not what.queue:
        return full_batches(asked.token_ids, size), settings
    together = 1 if size == 1 else len(asked.token_ids)
    return list(asked.token_ids), replace(settings, batch_size=together)


def full_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """As many of the prompts as fill batches; for the first batch they may be used again."""
    count = max(1, len(prompts) // batch_size) * batch_size
    return [prompts[i % len(prompts)] for i in range(count)]


def is_over(end: float | None) -> bool:
    """Whether ``time.monotonic()`` is past it."""
    return end is not None and time.monotonic() > end
