# SPDX-License-Identifier: Apache-2.0
"""What the worker counts: drafts, nodes, accepted tokens, fallbacks and where the time goes.

vLLM's own speculation metrics stay right about acceptance *length*; its acceptance *rate* divides
by nodes, of which a tree can accept at most one per depth. These figures add what it cannot see.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_redrafter.engine.acceptance_watch import AcceptanceWatch

logger = logging.getLogger("vllm.vllm_redrafter")


@dataclass
class ReDrafterStats:
    """Counters since the engine started.

    Attributes:
        steps: verification steps that held at least one tree or chain of ours.
        drafts: (request, step) pairs that were verified.
        nodes: drafted nodes verified, roots not counted.
        drafts_by_nodes: drafts by their number of nodes; on Model Runner V1.
        accepted_by_depth: how often a node of depth d + 1 was accepted.
        moves: KV rows moved because the accepted path was not the first chain.
        replaced: trees of this tensor-parallel rank that were not the first rank's.
        fallbacks: requests' drafts given up or cut to a chain, by reason.
        seconds: wall time inside our code, by part (draft, lookup, tree, walk, move, prepare).
        nodes_by_source, accepted_by_source: nodes verified and accepted, by who drafted them:
            drafter, lookup, both, or a grammar alone.
        predicted_accepted: how many nodes the budget expected to be accepted.
        steps_without_nodes: steps that nothing was drafted for, though it might have been.
        draft_shapes: drafts of a batch by "W,L" of the drafter's run, "0,0" where it did not run.
        timed_steps: steps without prompts, of which the next two are sums.
        predicted_step_seconds, real_step_seconds: what the budget thought, what they took; the
            draft included in both.
        seconds_without_nodes: of real_step_seconds, those of steps that verified nothing.
        last_seconds: the latest time of each part.
        watch: says once that hardly anything of the drafter's is accepted.
        draft_errors: errors that cost a step, or a request, its draft, by where they happened.
    """

    steps: int = 0
    drafts: int = 0
    nodes: int = 0
    drafts_by_nodes: Counter[int] = field(default_factory=Counter)
    accepted_by_depth: Counter[int] = field(default_factory=Counter)
    moves: int = 0
    replaced: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    nodes_by_source: Counter[str] = field(default_factory=Counter)
    accepted_by_source: Counter[str] = field(default_factory=Counter)
    predicted_accepted: float = 0.0
    steps_without_nodes: int = 0
    draft_shapes: Counter[str] = field(default_factory=Counter)
    timed_steps: int = 0
    predicted_step_seconds: float = 0.0
    real_step_seconds: float = 0.0
    seconds_without_nodes: float = 0.0
    last_seconds: dict[str, float] = field(default_factory=dict)
    watch: AcceptanceWatch = field(default_factory=AcceptanceWatch)
    draft_errors: Counter[str] = field(default_factory=Counter)

    def observe(self, nodes: int, accepted: int) -> None:
        """One request's draft was verified."""
        self.drafts += 1
        self.nodes += nodes
        self.drafts_by_nodes[nodes] += 1
        for depth in range(accepted):
            self.accepted_by_depth[depth] += 1

    def fall_back(self, reason: str) -> None:
        """One draft was not made, or made as a chain; logged the first time for each reason."""
        if not self.fallbacks[reason]:
            logger.info("ReDrafter falls back for requests with %s (logged once).", reason)
        self.fallbacks[reason] += 1

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.last_seconds[part] = time.perf_counter() - start
            self.seconds[part] += self.last_seconds[part]

    def time_step(self, predicted: float, real: float, has_nodes: bool) -> None:
        """A step without prompts took so many seconds."""
        self.timed_steps += 1
        self.predicted_step_seconds += predicted
        self.real_step_seconds += real
        self.seconds_without_nodes += 0.0 if has_nodes else real

    def summary(self) -> dict[str, Any]:
        """Plain values, for ``LLM.collective_rpc("redrafter_stats")``.

        ``acceptance_length`` counts the target's own token: 1.0 is plain decoding.
        """
        drafts = max(self.drafts, 1)
        depths = max(self.accepted_by_depth, default=-1) + 1
        accepted = [self.accepted_by_depth[depth] for depth in range(depths)]
        timed_steps = max(self.timed_steps, 1)
        return {
            "steps": self.steps,
            "drafts": self.drafts,
            "nodes_per_draft": self.nodes / drafts,
            "acceptance_length": 1 + sum(accepted) / drafts,
            "accepted_by_depth": [count / drafts for count in accepted],
            "moves": self.moves,
            "replaced": self.replaced,
            "fallbacks": dict(self.fallbacks),
            "draft_errors": dict(self.draft_errors),
            "seconds": dict(self.seconds),
            "nodes_by_source": dict(self.nodes_by_source),
            "accepted_by_source": dict(self.accepted_by_source),
            "predicted_acceptance": 1 + self.predicted_accepted / drafts,
            "steps_without_nodes": self.steps_without_nodes,
            "draft_shapes": dict(self.draft_shapes),
            "timed_steps": self.timed_steps,
            "predicted_step_ms": 1e3 * self.predicted_step_seconds / timed_steps,
            "share_of_time_without_nodes": self.seconds_without_nodes
            / (self.real_step_seconds or 1.0),
            "real_step_ms": 1e3 * self.real_step_seconds / timed_steps,
        }
