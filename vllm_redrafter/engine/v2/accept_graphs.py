# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the walk, the emitted tokens, the KV moves and the counters.

One replay stands between the target's tokens and what vLLM is told. Counted on a CPU: 8 operators
beside a replay, in place of 43. What is not in it, and why:

* vLLM's sampler, which decides on the host, from what the requests ask for, what it launches.
* Logprobs: they need processed logits, of which no more than a part of the step is held at once,
  and how many there are is the requests' choice. Steps that want any run eagerly.
* Grammars: nodes that were not checked make a tree shorter by a count over rows. Such steps run
  eagerly too.
* ``get_num_sampled_and_rejected`` and all after it until the draft: vLLM's. vLLM hands the sampled
  tokens to another stream there, and the draft must not delay them, so it has graphs of its own
  (``draft_graphs``). Keeping the drafted trees stays eager: with several ranks the first one's
  trees come between (``first_rank``).

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.v2.accept import WALK_FIELDS, Accepted, accept, kv_moves
from vllm_redrafter.engine.v2.request_graphs import RequestGraphs
from vllm_redrafter.engine.v2.sample_rows import SampleRows
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.tree_store import TreeStore
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.tree.walk import Walk


class AcceptBuffers:
    """What every such graph reads and writes, for R requests.

    Args:
        requests: R.
        nodes: N.
        depth: D, the deepest node that a tree can have.
        groups: KV cache groups.
        device: where.

    Attributes:
        drawn: ``[R * (N + 1)]`` int64, the target's token at every row; whoever draws writes here.
    """

    def __init__(
        self, requests: int, nodes: int, depth: int, groups: int, device: torch.device
    ) -> None:
        rows = requests * (nodes + 1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.slots, self.ends = zeros(requests), zeros(requests + 1)
        self.tokens, self.drawn = zeros(2, rows)
        self.row_slots = zeros(groups, rows)
        self.path, self.emitted = zeros(requests, depth), zeros(requests, nodes + 1)
        self.num_accepted, self.last_node, self.next_token, self.num_nodes = zeros(4, requests)

    def clear(self) -> None:
        """No request has rows: what runs now accepts, moves and counts nothing."""
        self.ends.zero_()

    def load(self, rows: SampleRows, row_slots: Tensor, requests: int) -> None:
        """What is known of a step beside ``drawn``; padding requests get no rows.

        Args:
            rows: all rows of the step.
            row_slots: ``[groups, rows]`` integers, where they are in the KV cache.
            requests: with padding.
        """
        real, count = rows.slots.shape[0], rows.tokens.shape[0]
        self.slots[:real].copy_(rows.slots)
        self.tokens[:count].copy_(rows.tokens)
        self.row_slots[:, :count].copy_(row_slots)
        self.ends[: real + 1].copy_(rows.ends)
        if real < requests:
            self.ends[real + 1 : requests + 1].fill_(count)

    def run(
        self, trees: TreeStore, movers: Sequence[MoveKV], stats: DeviceStats, requests: int
    ) -> None:
        """Accept and move for the first requests: from buffers, to buffers."""
        first = self.ends[:requests]
        # A padding request is a root alone: nothing accepted, moved or counted.
        scheduled = (self.ends[1 : requests + 1] - first).clamp_(min=1)
        slots = self.slots[:requests]
        found = accept(trees, slots, self.tokens, self.drawn, first, scheduled)
        sources, targets, moved = kv_moves(found.walk.path, first, self.row_slots)
        for mover, source, target in zip(movers, sources, targets, strict=True):
            mover(source, target)
        stats.observe(found.num_nodes > 1, found.num_nodes, found.walk.num_accepted)
        stats.observe_sources(trees.sources[slots], found.num_nodes, found.walk.path)
        stats.observe_moves(moved)
        for name in WALK_FIELDS:
            getattr(self, name)[:requests].copy_(getattr(found.walk, name))
        self.emitted[:requests].copy_(found.emitted)
        self.num_nodes[:requests].copy_(found.num_nodes)

    def result(self, requests: int) -> Accepted:
        """What is valid until the next step, but for ``emitted``, which is the caller's."""
        return Accepted(
            walk=Walk(**{name: getattr(self, name)[:requests] for name in WALK_FIELDS}),
            # vLLM copies it to the host on another stream, for which the next step does not wait.
            emitted=self.emitted[:requests].clone(),
            num_nodes=self.num_nodes[:requests],
        )


class AcceptGraphs(RequestGraphs):
    """Accepts and moves by graph.

    Args:
        vllm_config: vLLM's.
        device: where.
        state: has ``trees``, ``movers`` and ``stats``, as ``TreeModelState``; read at capture.
        buffers: for vLLM's ``max_num_seqs`` requests and all KV cache groups.
    """

    def __init__(
        self, vllm_config: Any, device: torch.device, state: Any, buffers: AcceptBuffers
    ) -> None:
        def run(requests: int) -> None:
            buffers.run(state.trees, state.movers, state.stats, requests)

        super().__init__(vllm_config, device, run, "Capturing ReDrafter's walk and KV moves")
        self.buffers = buffers

    def capture_all(self) -> None:
        # What warms up is the real thing, and would move KV by what an earlier step left here.
        self.buffers.clear()
        super().capture_all()

    def __call__(self, desc: Any, rows: SampleRows, row_slots: Tensor) -> Accepted:
        """Accept and move what a step, of which ``buffers.drawn`` was filled, decides.

        Args:
            desc: from ``find``, for the step's requests.
            rows, row_slots: see ``AcceptBuffers.load``.
        """
        self.buffers.load(rows, row_slots, desc.num_reqs)
        self.run_fullgraph(desc)
        return self.buffers.result(rows.slots.shape[0])
