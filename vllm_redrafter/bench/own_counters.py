# SPDX-License-Identifier: Apache-2.0
"""ReDrafter's own counters of one `generate` call, in a form that adds up over calls.

The engine keeps them since its start, some as means (`vllm_redrafter.engine.metrics`). What one
call added is a difference of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Sums by name, in groups such as "accepted_by_source".
OwnCounters = dict[str, dict[str, float]]

# Who can have drafted a token: one, the other, or each by itself.
SOURCES = ("drafter", "lookup", "both")
GROUPS = ("nodes_by_source", "accepted_by_source", "draft_shapes")
# Means of the engine, and what they are means over.
MEANS_OVER_DRAFTS = ("acceptance_length", "predicted_acceptance")
MEANS_OVER_TIMED_STEPS = ("predicted_step_ms", "real_step_ms")


def totals(stats: Mapping[str, Any]) -> OwnCounters:
    """Sums since start; a key that the engine does not have is left out.

    Args:
        stats: what `redrafter_stats` gave; {} for an engine without ReDrafter.
    """
    found: OwnCounters = {name: dict(stats[name]) for name in GROUPS if name in stats}
    sums = {
        name: stats[name]
        for name in ("steps", "drafts", "timed_steps", "steps_without_nodes")
        if name in stats
    }
    for over, names in (("drafts", MEANS_OVER_DRAFTS), ("timed_steps", MEANS_OVER_TIMED_STEPS)):
        sums |= {name: stats[name] * stats.get(over, 0) for name in names if name in stats}
    return {**found, "sums": sums} if sums else found


def gained(after: OwnCounters, before: OwnCounters) -> OwnCounters:
    """What was added in between; names without any change are left out."""
    out: OwnCounters = {}
    for group, values in after.items():
        earlier = before.get(group, {})
        changed = {name: value - earlier.get(name, 0) for name, value in values.items()}
        out[group] = {name: value for name, value in changed.items() if value}
    return out


def added(counters: Iterable[OwnCounters]) -> OwnCounters:
    """The sum over several calls."""
    out: OwnCounters = {}
    for one in counters:
        for group, values in one.items():
            into = out.setdefault(group, {})
            for name, value in values.items():
                into[name] = into.get(name, 0) + value
    return out


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Each count's part of their sum; {} where there is nothing."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def budget_facts(counters: OwnCounters) -> dict[str, float]:
    """What the node budget expected and what came, as means; {} where it counted nothing."""
    sums = counters.get("sums", {})
    facts = {}
    for over, names in (("drafts", MEANS_OVER_DRAFTS), ("timed_steps", MEANS_OVER_TIMED_STEPS)):
        if sums.get(over):
            facts |= {name: sums[name] / sums[over] for name in names if name in sums}
    if "acceptance_length" in facts:
        facts["real_acceptance"] = facts.pop("acceptance_length")
    without = sums.get("steps_without_nodes", 0)
    if without:
        facts["share_without_nodes"] = without / (without + sums.get("steps", 0))
    return facts
