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

logger = logging.getLogger("vllm.vllm_redrafter")


@dataclass
class ReDrafterStats:
    """Counters since the engine started.

    Attributes:
        steps: verification steps that held at least one tree or chain of ours.
        drafts: (request, step) pairs that were verified.
        nodes: drafted nodes verified, roots not counted.
        accepted_by_depth: how often a node of depth d + 1 was accepted.
        moves: KV rows moved because the accepted path was not the first chain.
        replaced: trees of this tensor-parallel rank that were not the first rank's.
        fallbacks: requests' drafts given up or cut to a chain, by reason.
        seconds: wall time inside our code, by part (draft, tree, walk, move, prepare).
    """

    steps: int = 0
    drafts: int = 0
    nodes: int = 0
    accepted_by_depth: Counter[int] = field(default_factory=Counter)
    moves: int = 0
    replaced: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def observe(self, nodes: int, accepted: int) -> None:
        """One request's draft was verified."""
        self.drafts += 1
        self.nodes += nodes
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
            self.seconds[part] += time.perf_counter() - start

    def summary(self) -> dict[str, Any]:
        """Plain values, for ``LLM.collective_rpc("redrafter_stats")``.

        ``acceptance_length`` counts the target's own token: 1.0 is plain decoding.
        """
        drafts = max(self.drafts, 1)
        depths = max(self.accepted_by_depth, default=-1) + 1
        accepted = [self.accepted_by_depth[depth] for depth in range(depths)]
        return {
            "steps": self.steps,
            "drafts": self.drafts,
            "nodes_per_draft": self.nodes / drafts,
            "acceptance_length": 1 + sum(accepted) / drafts,
            "accepted_by_depth": [count / drafts for count in accepted],
            "moves": self.moves,
            "replaced": self.replaced,
            "fallbacks": dict(self.fallbacks),
            "seconds": dict(self.seconds),
        }
