# SPDX-License-Identifier: Apache-2.0
"""Counters that live on the device: the step adds to them, only a summary reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.tree.candidates import FROM_DRAFTER, FROM_LOOKUP, SOURCE_NAMES

# Steps between two looks at the counters.
LOOK_EVERY = 512


class _Look:
    """A copy of the counters on its way to the host.

    Args:
        accepted, by_source: as in ``DeviceStats``.
    """

    def __init__(self, accepted: Tensor, by_source: Tensor) -> None:
        by_drafter = by_source[FROM_DRAFTER] + by_source[FROM_DRAFTER | FROM_LOOKUP]
        self._copy = torch.stack([accepted.sum(), by_drafter]).to("cpu", non_blocking=True)
        self._event: Any = None
        if accepted.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    @property
    def drafts(self) -> int:
        return int(self._copy[0])

    @property
    def accepted(self) -> int:
        """Nodes of the drafter."""
        return int(self._copy[1])

# Where an error of drafting happened, if what was drafted was no tree.
BAD_TREES = "checking trees"


class DeviceStats:
    """What ``ReDrafterStats`` counts, without a host read per step.

    CUDA graphs add to the tensors: they stay where they are.

    Attributes:
        accepted: ``[D + 1]`` int64, how many drafts had that many nodes accepted.
        nodes: ``[1]`` int64, drafted nodes verified.
        nodes_by_source, accepted_by_source: ``[4]`` int64, nodes verified and accepted, by who
            drafted them (``tree.candidates``); the first entry means nothing.
        moves: ``[1]`` int64, KV rows moved.
        replaced: ``[1]`` int64, trees that were not the first tensor-parallel rank's.
        bad_trees: ``[1]`` int64, drafts that were no trees.
        host: what the host knows anyway: steps, and requests that fell back.
    """

    def __init__(self, depth: int, device: torch.device) -> None:
        self.accepted = torch.zeros(depth + 1, dtype=torch.int64, device=device)
        kinds = 1 + max(SOURCE_NAMES)
        self.nodes_by_source = torch.zeros(kinds, dtype=torch.int64, device=device)
        self.accepted_by_source = torch.zeros(kinds, dtype=torch.int64, device=device)
        self.nodes = torch.zeros(1, dtype=torch.int64, device=device)
        self.moves = torch.zeros(1, dtype=torch.int64, device=device)
        self.replaced = torch.zeros(1, dtype=torch.int64, device=device)
        self.bad_trees = torch.zeros(1, dtype=torch.int64, device=device)
        self.host = ReDrafterStats()
        self._look: _Look | None = None
        self._seen = 0, 0

    def reset(self) -> None:
        """Count from nothing, where CUDA graphs count too."""
        for counter in vars(self).values():
            if isinstance(counter, Tensor):
                counter.zero_()
        self.host = ReDrafterStats()
        self._look, self._seen = None, (0, 0)

    def observe_step(self) -> None:
        """One step was verified. Of the host, and so not in what a CUDA graph replays."""
        self.host.steps += 1
        if self.host.steps % LOOK_EVERY == 0:
            self._look_at_acceptance()

    def _look_at_acceptance(self) -> None:
        """Note what the last look found, if it has arrived, and start another; never waits."""
        if self._look is not None and self._look.arrived:
            now = self._look.drafts, self._look.accepted
            self.host.watch.note(now[0] - self._seen[0], now[1] - self._seen[1])
            self._seen = now
        self._look = _Look(self.accepted, self.accepted_by_source)

    def observe(self, drafted: Tensor, num_nodes: Tensor, num_accepted: Tensor) -> None:
        """What one step verified; the step itself is counted by ``observe_step``.

        Args:
            drafted: ``[B]`` bool, requests that had at least one node.
            num_nodes: ``[B]`` int64, counting the root.
            num_accepted: ``[B]`` int64.
        """
        self.accepted.index_add_(0, num_accepted, drafted.long())
        self.nodes += (num_nodes - 1).sum()

    def observe_sources(self, sources: Tensor, num_nodes: Tensor, path: Tensor) -> None:
        """Who drafted what one step verified.

        Args:
            sources: ``[B, N + 1]`` int64, 0 for the root and for padding.
            num_nodes: ``[B]`` int64, counting the root.
            path: ``[B, D]`` int64, as ``Walk.path``.
        """
        columns = torch.arange(sources.shape[1], device=sources.device)
        verified = columns < num_nodes[:, None]
        self.nodes_by_source.index_add_(0, sources.flatten(), verified.flatten().long())
        accepted = sources.gather(1, path.clamp(min=0)).flatten()
        self.accepted_by_source.index_add_(0, accepted, (path > 0).flatten().long())

    def observe_moves(self, moved: Tensor) -> None:
        """``moved``: bool of any shape, one entry per row that may have moved."""
        self.moves += moved.sum()

    def observe_replaced(self, replaced: Tensor) -> None:
        """``replaced``: ``[B]`` bool."""
        self.replaced += replaced.sum()

    def observe_bad_trees(self, bad: Tensor) -> None:
        """``bad``: ``[B]`` bool."""
        self.bad_trees += bad.sum()

    def copied(self) -> Callable[[], ReDrafterStats]:
        """What was counted up to here, on its way to the host; the result waits for it."""
        counters = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        copy = torch.cat(list(counters.values())).to("cpu", non_blocking=True)
        event: Any = None
        if self.nodes.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        host = _host_part(self.host)

        def arrive() -> ReDrafterStats:
            if event is not None:
                event.synchronize()
            parts = copy.split([len(counter) for counter in counters.values()])
            _add(host, dict(zip(counters, (part.tolist() for part in parts), strict=True)))
            return host

        return arrive

    def summary(self) -> dict[str, Any]:
        """As ``ReDrafterStats.summary``; reads the device."""
        return self.copied()().summary()


def _host_part(host: ReDrafterStats) -> ReDrafterStats:
    """What the host counts; it may count on while the copy is read in another thread."""
    return ReDrafterStats(
        steps=host.steps,
        fallbacks=host.fallbacks.copy(),
        draft_errors=host.draft_errors.copy(),
        steps_without_nodes=host.steps_without_nodes,
    )


def _add(out: ReDrafterStats, counted: dict[str, list[int]]) -> None:
    """The device's counters, by their names in ``DeviceStats``."""
    if bad := counted["bad_trees"][0]:
        out.draft_errors[BAD_TREES] += bad
    histogram = counted["accepted"]
    out.drafts = sum(histogram)
    out.nodes = counted["nodes"][0]
    out.moves = counted["moves"][0]
    out.replaced = counted["replaced"][0]
    for source, name in SOURCE_NAMES.items():
        out.nodes_by_source[name] = counted["nodes_by_source"][source]
        out.accepted_by_source[name] = counted["accepted_by_source"][source]
    for length, count in enumerate(histogram):
        for depth in range(length if count else 0):
            out.accepted_by_depth[depth] += count
