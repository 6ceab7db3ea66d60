# SPDX-License-Identifier: Apache-2.0
"""The metrics: names, what they say, and where they stand in ``ReDrafterStats``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.options import ReDrafterOptions
from vllm_redrafter.tree.candidates import ALL_SOURCE_NAMES

# As vLLM's own metrics have them.
LABELS = ("model_name", "engine")

# By label value; "" where there is no label.
Values = Mapping[str, float]


@dataclass(frozen=True)
class Metric:
    """One counter.

    Attributes:
        name: as Prometheus shows it.
        documentation: one sentence, for the endpoint and the README.
        read: its values since the engine started.
        label: the label beside ``LABELS``, "" for none.
        known: label values that are shown from the start on, as 0.
    """

    name: str
    documentation: str
    read: Callable[[ReDrafterStats], Values]
    label: str = ""
    known: Callable[[ReDrafterOptions], Iterable[str]] = lambda _: ()


def _one(attribute: str) -> Callable[[ReDrafterStats], Values]:
    return lambda stats: {"": getattr(stats, attribute)}


def _each(attribute: str) -> Callable[[ReDrafterStats], Values]:
    return lambda stats: {str(key): count for key, count in getattr(stats, attribute).items()}


def _by_depth(stats: ReDrafterStats) -> Values:
    return {str(depth + 1): count for depth, count in stats.accepted_by_depth.items()}


def _accepted(stats: ReDrafterStats) -> Values:
    return {"": sum(stats.accepted_by_depth.values())}


def _depths(options: ReDrafterOptions) -> Iterable[str]:
    return map(str, range(1, options.max_depth + 1))


def _sources(_: ReDrafterOptions) -> Iterable[str]:
    return ALL_SOURCE_NAMES.values()


COUNTERS = (
    Metric(
        "redrafter_steps_total",
        "Steps in which at least one draft was verified.",
        _one("steps"),
    ),
    Metric(
        "redrafter_steps_without_nodes_total",
        "Steps after which nothing was drafted, though it might have been.",
        _one("steps_without_nodes"),
    ),
    Metric(
        "redrafter_drafts_total",
        "Drafts verified, one per request and step.",
        _one("drafts"),
    ),
    Metric(
        "redrafter_drafts_by_nodes_total",
        "Drafts verified, by their number of nodes: what the node budget chose.",
        _each("drafts_by_nodes"),
        "nodes",
    ),
    Metric(
        "redrafter_nodes_total",
        "Drafted nodes verified, roots not counted.",
        _one("nodes"),
    ),
    Metric(
        "redrafter_nodes_by_source_total",
        "Drafted nodes verified, by who drafted them: "
        "drafter, lookup, both or grammar.",
        _each("nodes_by_source"),
        "source",
        _sources,
    ),
    Metric(
        "redrafter_accepted_tokens_total",
        "Drafted tokens that the target said too.",
        _accepted,
    ),
    Metric(
        "redrafter_accepted_tokens_by_depth_total",
        "Drafted tokens that the target said too, by depth; 1 is the first drafted token.",
        _by_depth,
        "depth",
        _depths,
    ),
    Metric(
        "redrafter_accepted_tokens_by_source_total",
        "Drafted tokens that the target said too, by who drafted them: "
        "drafter, lookup, both or grammar.",
        _each("accepted_by_source"),
        "source",
        _sources,
    ),
    Metric(
        "redrafter_predicted_accepted_tokens_total",
        "Drafted tokens that the node budget expected the target to say.",
        _one("predicted_accepted"),
    ),
    Metric(
        "redrafter_fallbacks_total",
        "Drafts not made, or made as a chain, by reason.",
        _each("fallbacks"),
        "reason",
    ),
    Metric(
        "redrafter_draft_errors_total",
        "Errors that cost a draft, by where they happened.",
        _each("draft_errors"),
        "part",
    ),
    Metric(
        "redrafter_part_seconds_total",
        "Wall time inside ReDrafter's own code, by part of a step.",
        _each("seconds"),
        "part",
    ),
    Metric(
        "redrafter_draft_shapes_total",
        "Drafts of a batch, by beam width and length of the drafter's run; 0,0: it did not run.",
        _each("draft_shapes"),
        "shape",
    ),
    Metric(
        "redrafter_timed_steps_total",
        "Steps without prompts, of which the three metrics of step seconds are sums.",
        _one("timed_steps"),
    ),
    Metric(
        "redrafter_step_seconds_total",
        "Wall time of the timed steps, drafts included.",
        _one("real_step_seconds"),
    ),
    Metric(
        "redrafter_predicted_step_seconds_total",
        "What the node budget expected the timed steps to take, drafts included.",
        _one("predicted_step_seconds"),
    ),
    Metric(
        "redrafter_step_seconds_without_nodes_total",
        "Wall time of those of the timed steps that verified nothing.",
        _one("seconds_without_nodes"),
    ),
    Metric(
        "redrafter_moved_kv_rows_total",
        "KV rows moved because the accepted path was not the first chain.",
        _one("moves"),
    ),
)

OFF = "redrafter_drafting_off"
OFF_DOCUMENTATION = "1 after too many errors in a row: nothing is drafted until a restart; else 0."

INFO = "redrafter_config_info"
INFO_DOCUMENTATION = "Always 1; its labels are the options in use."
# Label: attribute of ``ReDrafterOptions``.
INFO_LABELS = {
    "drafter": "model",
    "beam_width": "beam_width",
    "draft_length": "draft_length",
    "num_speculative_tokens": "num_speculative_tokens",
    "tree": "tree",
    "prompt_lookup": "prompt_lookup",
    "node_budget": "node_budget",
}


def labels_of_all() -> dict[str, tuple[str, ...]]:
    """Every metric by the name that Prometheus shows, with all of its labels."""
    found = {m.name: LABELS + ((m.label,) if m.label else ()) for m in COUNTERS}
    return {**found, OFF: LABELS, INFO: (*LABELS, *INFO_LABELS)}
