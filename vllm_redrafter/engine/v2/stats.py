# SPDX-License-Identifier: Apache-2.0
"""Counters that live on the device: the step adds to them, only a summary reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.metrics import ReDrafterStats


class DeviceStats:
    """What ``ReDrafterStats`` counts, without a host read per step.

    CUDA graphs add to the tensors: they stay where they are.

    Attributes:
        accepted: ``[N + 1]`` int64, how many drafts had that many nodes accepted.
        nodes: ``[1]`` int64, drafted nodes verified.
        moves: ``[1]`` int64, KV rows moved.
        replaced: ``[1]`` int64, trees that were not the first tensor-parallel rank's.
        host: what the host knows anyway: steps, and requests that fell back.
    """

    def __init__(self, nodes: int, device: torch.device) -> None:
        self.accepted = torch.zeros(nodes + 1, dtype=torch.int64, device=device)
        self.nodes = torch.zeros(1, dtype=torch.int64, device=device)
        self.moves = torch.zeros(1, dtype=torch.int64, device=device)
        self.replaced = torch.zeros(1, dtype=torch.int64, device=device)
        self.host = ReDrafterStats()

    def observe_step(self) -> None:
        """One step was verified. Of the host, and so not in what a CUDA graph replays."""
        self.host.steps += 1

    def observe(self, drafted: Tensor, num_nodes: Tensor, num_accepted: Tensor) -> None:
        """What one step verified; the step itself is counted by ``observe_step``.

        Args:
            drafted: ``[B]`` bool, requests that had at least one node.
            num_nodes: ``[B]`` int64, counting the root.
            num_accepted: ``[B]`` int64.
        """
        self.accepted.index_add_(0, num_accepted, drafted.long())
        self.nodes += (num_nodes - 1).sum()

    def observe_moves(self, moved: Tensor) -> None:
        """``moved``: bool of any shape, one entry per row that may have moved."""
        self.moves += moved.sum()

    def observe_replaced(self, replaced: Tensor) -> None:
        """``replaced``: ``[B]`` bool."""
        self.replaced += replaced.sum()

    def summary(self) -> dict[str, Any]:
        """As ``ReDrafterStats.summary``; reads the device."""
        out, histogram = ReDrafterStats(), self.accepted.tolist()
        out.steps, out.fallbacks = self.host.steps, self.host.fallbacks
        out.drafts = sum(histogram)
        out.nodes = int(self.nodes)
        out.moves = int(self.moves)
        out.replaced = int(self.replaced)
        for length, count in enumerate(histogram):
            for depth in range(length if count else 0):
                out.accepted_by_depth[depth] += count
        return out.summary()
