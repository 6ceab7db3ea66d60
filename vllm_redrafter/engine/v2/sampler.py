# SPDX-License-Identifier: Apache-2.0
"""Exact sampling of trees on the device, in place of vLLM's chain rejection sampler.

vLLM's own sampler draws the target's token at every row. A draw is a function of the request's
seed and of a position; given the depth position of a node it is the very draw that plain decoding
makes at that place. The walk then follows the drawn tokens: whatever was drafted, what is emitted
is the target's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_redrafter.engine.v2.sample_rows import SampleRows
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.tree_store import TreeStore
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import Walk


@dataclass
class Step:
    """One engine step, from its inputs to the draft of the next.

    Attributes:
        positions: ``[T]`` int64, the root's position plus the depth for every row.
        walk: set by the sampler when the step held drafts.
        slot_mappings: ``[groups, T]`` int64, where the step's rows are in the KV cache.
        root_rows: ``[B]`` int64, query row of every request's root.
    """

    positions: Tensor
    walk: Walk | None = None
    slot_mappings: Tensor | None = None
    root_rows: Tensor | None = None


@dataclass(frozen=True)
class _Sampled:
    """Of some requests: see ``TreeSampler._walk``; and their logprobs, if any are wanted."""

    found: Walk
    emitted: Tensor
    num_nodes: Tensor
    logprobs: Any


class TreeSampler:
    """Called by the runner where it would call ``RejectionSampler``.

    Args:
        sampler: vLLM's ``Sampler``.
        trees: the topology of the running requests.
        stats: counters.
    """

    def __init__(self, sampler: Any, trees: TreeStore, stats: DeviceStats) -> None:
        self.sampler = sampler
        self.trees = trees
        self.stats = stats
        self.step: Step | None = None
        # The most logits rows that are sampled at once; None is what vLLM's own samplers take.
        self.max_chunk_rows: int | None = None

    def __call__(
        self,
        logits: Tensor,
        input_batch: Any,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> SamplerOutput:
        """Sample, walk, and say which tokens were emitted.

        Args:
            logits: ``[rows, V]``, a row for the root and one for every scheduled node of every
                request; grammar masks applied.
            input_batch: vLLM's ``InputBatch``.
            draft_logits: not used; vLLM passes it for rejection sampling.
            invalid_drafts: ``[rows]`` bool, nodes that a grammar did not check.

        No more than ``max_chunk_rows`` rows are sampled at once, whole requests each.
        """
        assert self.step is not None
        sampler = self.sampler
        # Before penalties and temperature, as vLLM counts them.
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        rows = SampleRows.of(logits, input_batch, self.step.positions, invalid_drafts)
        dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        most = self.max_chunk_rows or get_max_chunk_logits(logits.shape[1])
        parts = [self._sample(part, dims) for part in rows.chunks(most)]
        found = _joined([part.found for part in parts])
        num_nodes = torch.cat([part.num_nodes for part in parts])
        self.stats.observe(num_nodes > 1, num_nodes, found.num_accepted)
        self.step.walk = found
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            (found.num_accepted + 1).int(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            sampler.req_states.prefill_len.gpu,
        )
        logprobs = None
        if dims is not None:
            several = logits.shape[0] != input_batch.num_reqs
            logprobs = LogprobsTensors.cat(
                [part.logprobs for part in parts],
                input_batch.cu_num_logits_np.tolist() if several else None,
            )
        return SamplerOutput(
            sampled_token_ids=torch.cat([part.emitted for part in parts]),
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _sample(self, rows: SampleRows, dims: tuple[int, int] | None) -> _Sampled:
        """Draw and walk for some requests; what holds their processed logits ends here."""
        sampler = self.sampler
        drawn, processed = sampler.sample(
            rows.logits,
            rows.row_slots,
            rows.slots,
            rows.slots_np,
            rows.positions,
            rows.tokens,
            rows.row_nodes,
            rows.seq_lens_np,
            return_logprobs=dims is not None,
        )
        found, emitted, num_nodes = self._walk(drawn, rows)
        logprobs = None
        if dims is not None:
            by_processed = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
            logits = processed if by_processed else rows.logits
            logprobs = self._logprobs(logits, emitted, found, rows, dims)
        return _Sampled(found, emitted, num_nodes, logprobs)

    def _walk(self, drawn: Tensor, rows: SampleRows) -> tuple[Walk, Tensor, Tensor]:
        """The accepted paths, ``[B, N + 1]`` emitted tokens (0 behind the last), ``[B]`` nodes.

        Args:
            drawn: ``[rows]`` int64, the target's token at every row.
            rows: of the same requests.
        """
        trees, slots = self.trees, rows.slots
        first = rows.ends[:-1].long()
        scheduled = rows.ends[1:].long() - first
        if rows.invalid is not None:
            # Grammars check a draft from its start, so what is valid is a prefix.
            owner = self._owner(scheduled, drawn.shape[0])
            valid = torch.zeros_like(scheduled)
            scheduled = valid.index_add_(0, owner, (~rows.invalid).long())
        # The scheduler may have cut a draft to its first nodes; they are a tree of their own.
        num_nodes = trees.num_nodes[slots].minimum(scheduled)
        columns = torch.arange(trees.nodes + 1, device=drawn.device)
        at = (first[:, None] + columns).clamp_(max=drawn.shape[0] - 1)
        tree = Tree(rows.tokens[at].long(), trees.parents[slots], trees.depths[slots], num_nodes)
        drawn = drawn[at]
        found = walk(tree, drawn, max_depth=trees.nodes)
        emitted = drawn.gather(1, path_nodes(found))
        emitted = torch.where(columns <= found.num_accepted[:, None], emitted, 0)
        return found, emitted, num_nodes

    def _logprobs(
        self, logits: Tensor, emitted: Tensor, found: Walk, rows: SampleRows, dims: tuple[int, int]
    ) -> Any:
        """Scores in the order that vLLM reads: row t of a request is its t-th emitted token's."""
        first = rows.ends[:-1].long()
        owner = self._owner(rows.ends[1:].long() - first, logits.shape[0])
        place = rows.row_nodes.long()
        node = path_nodes(found)[owner, place]
        on_path = place <= found.num_accepted[owner]
        source = first[owner] + torch.where(on_path, node, place)
        num_logprobs, token_ids = dims
        return compute_topk_scores(
            logits[source],
            num_logprobs,
            emitted[owner, place],
            # For vLLM's use the boundaries of the whole step follow.
            None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=rows.row_slots,
            max_per_req_token_ids=token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def _owner(self, counts: Tensor, rows: int) -> Tensor:
        """``[rows]`` int64, which request of the batch each logits row belongs to."""
        batch = torch.arange(counts.shape[0], device=counts.device)
        return torch.repeat_interleave(batch, counts, output_size=rows)


def path_nodes(found: Walk) -> Tensor:
    """``[B, D + 1]`` int64: the root, then the accepted nodes; 0 behind the last."""
    root = torch.zeros_like(found.last_node)[:, None]
    return torch.cat([root, found.path.clamp(min=0)], 1)


def _joined(walks: list[Walk]) -> Walk:
    """Of consecutive requests, with paths of one width."""
    if len(walks) == 1:
        return walks[0]
    return Walk(**{name: torch.cat([getattr(w, name) for w in walks]) for name in vars(walks[0])})
