# SPDX-License-Identifier: Apache-2.0
"""`redrafter_*` of a server, held against what vLLM's scheduler counted by itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm_redrafter.engine.prometheus.catalog import COUNTERS, labels_of_all

# Ours: vLLM's, counted by the scheduler from the lists of tokens alone.
SAME = {
    "redrafter_drafts_total": "vllm:spec_decode_num_drafts_total",
    "redrafter_nodes_total": "vllm:spec_decode_num_draft_tokens_total",
    "redrafter_accepted_tokens_total": "vllm:spec_decode_num_accepted_tokens_total",
}
SECONDS_TO_ARRIVE = 20


def by_label(server: Any, name: str, label: str) -> dict[str, float]:
    """A metric's values by one label, summed over the others; without those that are 0."""
    found: Counter[str] = Counter()
    for sample in server.samples():
        if sample.name == name:
            found[sample.labels[label]] += sample.value
    return {value: count for value, count in found.items() if count}


def settled(server: Any) -> dict[str, float]:
    """All metrics, once messages have ceased: an idle engine sends what is left.

    A step may run for a request that has just ended, because its client left or because scheduling
    is asynchronous; the scheduler then counts nothing of it.
    """
    return _wait(server, lambda new, before: new == before and _at_least(new), pause=1.5)


def settled_since(server: Any, since: dict[str, float]) -> dict[str, float]:
    """All metrics, once the requests since then are counted as the scheduler counts them."""
    return _wait(server, lambda new, _: _equal_since(new, since), pause=0.2)


def _at_least(metrics: dict[str, float]) -> bool:
    """Nodes are left out: with asynchronous scheduling vLLM counts those there was room for."""
    counted = (name for name in SAME if name != "redrafter_nodes_total")
    return all(metrics[name] >= metrics.get(SAME[name], 0.0) for name in counted)


def _equal_since(metrics: dict[str, float], since: dict[str, float]) -> bool:
    def new(name: str) -> float:
        return metrics.get(name, 0.0) - since.get(name, 0.0)

    return all(new(ours) == new(theirs) for ours, theirs in SAME.items())


def _wait(
    server: Any, done: Callable[[dict[str, float], dict[str, float]], bool], pause: float
) -> dict[str, float]:
    deadline, before = time.monotonic() + SECONDS_TO_ARRIVE, {}
    names = [*SAME, *SAME.values()]
    while True:
        metrics = server.metrics()
        counted = {name: metrics.get(name, 0.0) for name in names}
        if done(counted, before):
            return metrics
        assert time.monotonic() < deadline, counted
        before = counted
        time.sleep(pause)


def check_names(server: Any) -> None:
    """Every metric of the catalog is there with its labels, and no other of ours."""
    labels = labels_of_all()
    seen = {}
    for sample in server.samples():
        # prometheus_client adds when a counter was made.
        if sample.name.startswith("redrafter_") and not sample.name.endswith("_created"):
            seen.setdefault(sample.name, set()).add(tuple(sample.labels))
    assert {name: {tuple(sorted(of)) for of in each} for name, each in seen.items()} == {
        name: {tuple(sorted(of))} for name, of in labels.items() if name in seen
    }
    # A counter by a label of which nothing was counted yet has no sample.
    open_ended = {m.name for m in COUNTERS if m.label and m.label not in ("source", "depth")}
    assert set(labels) - set(seen) <= open_ended


def check_sums(server: Any, metrics: dict[str, float], v1: bool) -> None:
    """The parts add up to the wholes."""
    nodes, accepted = metrics["redrafter_nodes_total"], metrics["redrafter_accepted_tokens_total"]
    assert 0 < accepted <= nodes
    depths = by_label(server, "redrafter_accepted_tokens_by_depth_total", "depth")
    assert sum(depths.values()) == accepted
    counts = [depths[str(depth)] for depth in sorted(map(int, depths))]
    assert counts == sorted(counts, reverse=True), "a depth is reached through the one before"
    of_nodes = by_label(server, "redrafter_nodes_by_source_total", "source")
    of_accepted = by_label(server, "redrafter_accepted_tokens_by_source_total", "source")
    assert sum(of_accepted.values()) <= accepted
    assert all(0 < of_accepted[source] <= of_nodes[source] for source in of_accepted)
    if v1:
        sizes = by_label(server, "redrafter_drafts_by_nodes_total", "nodes")
        assert sum(sizes.values()) == metrics["redrafter_drafts_total"]
        assert sum(int(size) * count for size, count in sizes.items()) == nodes
