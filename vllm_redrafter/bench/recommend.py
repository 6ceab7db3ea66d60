# SPDX-License-Identifier: Apache-2.0
"""Which variant to serve with, from what was measured: the flag to paste, and why.

A variant's score is the geometric mean of its speed-ups over plain vLLM under all loads that every
variant was measured under: batch sizes on every set and, where each had a server, request rates. At
a rate the speed-up is plain vLLM's time per output token over the variant's: how many tokens come
per second is then up to the clients. Other loads only say where the chosen variant loses. What is
within `TIE` of the best counts as equal to it, and of equals the simplest is taken. Differences of
times that were measured beside other work are not worth a flag, and the sentence says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_redrafter.bench import variants as kinds
from vllm_redrafter.bench.compare import BUSY_CORES

# Alternating runs of one engine beside itself differ by about as much.
TIE = 0.03
# From the simplest to the most special.
_SIMPLE = (kinds.PLAIN, kinds.REDRAFTER, kinds.NGRAM, kinds.SUFFIX, kinds.CHAIN, kinds.BEAMS)


@dataclass(frozen=True)
class Measured:
    """One variant's speed-up over plain vLLM under one load.

    Attributes:
        load: such as "batch size 8" or "2 requests/s".
        speed_up: 1.0 is plain vLLM's.
        rounds: the same of every round alone.
    """

    variant: str
    load: str
    speed_up: float
    rounds: tuple[float, ...] = ()


def measured(report: Mapping[str, Any]) -> list[Measured]:
    """Every speed-up in a report."""
    found = []
    several = len(report.get("sets", ())) > 1
    for result in report["results"]:
        load = f"batch size {result['batch_size']}"
        if several:
            load += f" of {result['set']}"
        for name, parts in result["variants"].items():
            if ratio := parts["all"]["ratio"]:
                rounds = tuple(ratio["per_round"])
                found.append(Measured(name, load, ratio["overall"], rounds))
    for row in report.get("rates", ()):
        for name, one in row["servers"].items():
            if ratio := one.get("ratios", {}).get("tpot_p50_ms"):
                speed_ups = (1 / ratio["median"], 1 / ratio["high"], 1 / ratio["low"])
                found.append(Measured(name, f"{row['rate']:g} requests/s", speed_ups[0], speed_ups))
    return found


def scores(found: Sequence[Measured]) -> dict[str, float]:
    """Geometric means over the loads under which every variant was measured; plain vLLM's is 1.

    Where there is no such load, variants that were measured under fewer than another are left out.
    """
    by_variant: dict[str, dict[str, float]] = {}
    for one in found:
        by_variant.setdefault(one.variant, {})[one.load] = one.speed_up
    if not by_variant:
        return {kinds.PLAIN: 1.0}
    common = set.intersection(*(set(loads) for loads in by_variant.values()))
    if not common:
        most = max(len(loads) for loads in by_variant.values())
        by_variant = {name: loads for name, loads in by_variant.items() if len(loads) == most}
        common = set.intersection(*(set(loads) for loads in by_variant.values()))
    means = {
        name: math.exp(sum(math.log(loads[load]) for load in common) / len(common))
        for name, loads in by_variant.items()
    }
    return {kinds.PLAIN: 1.0, **means}


def choose(found: Mapping[str, float]) -> str:
    """The simplest variant whose score is within `TIE` of the best."""
    best = max(found.values())
    equal = [name for name, score in found.items() if score >= best / (1 + TIE)]
    return min(equal, key=lambda n: _SIMPLE.index(n) if n in _SIMPLE else len(_SIMPLE))


def recommend(report: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Any]:
    """What to serve with.

    Args:
        report: as `run` makes it; what was measured so far is enough.
        configs: speculative_config of every variant, with the names that a user would give.

    Returns:
        "variant"; "flag", text for a command line, empty for plain vLLM; "why", sentences;
        "scores" by variant; "sure", False where times should not be relied on.
    """
    found = measured(report)
    labels = report["labels"]
    if not found:
        why = "Nothing was measured, so nothing is recommended: raise --minutes."
        return {"variant": None, "flag": "", "why": why, "scores": {}, "sure": False}
    points = scores(found)
    variant = choose(points)
    config = configs.get(variant)
    flag = f"--speculative-config '{json.dumps(config)}'" if config else ""
    busy = max([r["other_load"] for r in (*report["results"], *report.get("rates", ()))])
    why = [_verdict(variant, points, labels), *_losses(variant, found)]
    unsteady = _unsteady(variant, found)
    if busy > BUSY_CORES:
        why.append(f"Other programs used up to {busy:.1f} cores meanwhile, so measure again on a "
                   "quiet machine before you rely on it.")  # fmt: skip
    elif unsteady:
        why.append("Its rounds differ by more than its gain, so run more --rounds or more prompts "
                   "before you rely on it.")  # fmt: skip
    return {"variant": variant, "flag": flag, "why": " ".join(why), "scores": points,
            "sure": busy <= BUSY_CORES and not unsteady}  # fmt: skip


def _verdict(variant: str, points: Mapping[str, float], labels: Mapping[str, str]) -> str:
    ranked = sorted(points.items(), key=lambda item: -item[1])
    left_out = (variant, kinds.PLAIN)
    others = ", ".join(f"{labels[n]} {score:.2f}" for n, score in ranked if n not in left_out)
    if variant == kinds.PLAIN:
        return (
            f"Leave speculative decoding out: nothing that was measured is more than {TIE:.0%} "
            f"faster than plain vLLM (over all loads: {others})."
        )
    text = f"{labels[variant]}: over all loads {points[variant]:.2f} times plain vLLM"
    text += f" ({others})." if others else "."
    best, score = ranked[0]
    if best != variant:
        text += (
            f" {labels[best]} is less than {TIE:.0%} faster, which such runs cannot tell apart, "
            "and less simple."
        )
    return text


def _losses(variant: str, found: Sequence[Measured]) -> list[str]:
    """Where the chosen variant is slower than plain vLLM."""
    slow = [one for one in found if one.variant == variant and one.speed_up < 1]
    if variant == kinds.PLAIN or not slow:
        return []
    where = ", ".join(f"{one.load} ({one.speed_up:.2f})" for one in slow)
    return [f"It is slower than plain vLLM at {where}."]


def _unsteady(variant: str, found: Sequence[Measured]) -> bool:
    """Whether some round of the chosen variant says the opposite of all of them together."""
    return any(
        min(one.rounds) < 1 < max(one.rounds) and one.speed_up > 1
        for one in found
        if one.variant == variant and len(one.rounds) > 1
    )
