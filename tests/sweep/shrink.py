# SPDX-License-Identifier: Apache-2.0
"""Makes a failing case as small as it can be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from sweep.space import DEFAULTS, Case


def shrink(case: Case, fails: Callable[[Case], bool], most: int = 200) -> Case:
    """A smaller case that still fails.

    Args:
        fails: called at most ``most`` times.
    """
    tries = 0
    while True:
        for smaller in _smaller(case):
            tries += 1
            if tries > most:
                return case
            if fails(smaller):
                case = smaller
                break
        else:
            return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with something less, the largest steps first."""
    requests = case["requests"]
    size = len(requests) // 2
    while size:
        for at in range(0, len(requests), size):
            yield {**case, "requests": requests[:at] + requests[at + size :]}
        size //= 2
    for number, request in enumerate(requests):
        for simpler in _simpler(request):
            changed = copy.copy(requests)
            changed[number] = simpler
            yield {**case, "requests": changed}
    for name in case["settings"]:
        usual = DEFAULTS.get(name)
        if case["settings"][name] != usual:
            settings = {k: v for k, v in case["settings"].items() if k != name}
            yield {**case, "settings": settings if usual is None else {**settings, name: usual}}


def _simpler(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("aborted_after", "priority"):
        if name in request:
            yield {k: v for k, v in request.items() if k != name}
    if request["at"]:
        yield {**request, "at": 0}
    params = request["params"]
    for name in sorted(params.keys() - {"temperature", "max_tokens", "seed"}):
        yield {**request, "params": {k: v for k, v in params.items() if k != name}}
    if params["temperature"]:
        greedy = {k: v for k, v in params.items() if k not in ("seed", "n", "top_k", "top_p")}
        yield {**request, "params": {**greedy, "temperature": 0.0}}
    if params["max_tokens"] > 1:
        for tokens in sorted({params["max_tokens"] // 2, params["max_tokens"] - 1}):
            least = min(params.get("min_tokens", 0), tokens)
            fewer = {**params, "max_tokens": tokens}
            yield {**request, "params": {**fewer, "min_tokens": least} if least else fewer}
    prompt = request["prompt"]
    if len(prompt) > 1:
        yield {**request, "prompt": prompt[: len(prompt) // 2]}
        yield {**request, "prompt": prompt[1:]}
