# SPDX-License-Identifier: Apache-2.0
"""Exact sampling of trees on the device, in place of vLLM's chain rejection sampler.

vLLM's own sampler draws the target's token at every row. A draw is a function of the request's
seed and of a position; given the depth position of a node it is the very draw that plain decoding
makes at that place. The walk then follows the drawn tokens: whatever was drafted, what is emitted
is the target's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_redrafter.engine.thorough import check_logits, thorough
from vllm_redrafter.engine.v2.accept import WALK_FIELDS, Accepted, accept, path_nodes
from vllm_redrafter.engine.v2.sample_rows import SampleRows
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.tree_store import TreeStore
from vllm_redrafter.tree.walk import Walk

if TYPE_CHECKING:
    from vllm_redrafter.engine.v2.accept_graphs import AcceptGraphs


@dataclass
class Step:
    """One engine step, from its inputs to the draft of the next.

    Attributes:
        positions: ``[T]`` int64, the root's position plus the depth for every row.
        walk: set by the sampler when the step held drafts.
        slot_mappings: ``[groups, T]`` int64, where the step's rows are in the KV cache.
        root_rows: ``[B]`` int64, query row of every request's root.
        kv_moved: a graph has moved the accepted paths' KV already.
    """

    positions: Tensor
    walk: Walk | None = None
    slot_mappings: Tensor | None = None
    root_rows: Tensor | None = None
    kv_moved: bool = False


class TreeSampler:
    """Called by the runner where it would call ``RejectionSampler``.

    Args:
        sampler: vLLM's ``Sampler``.
        trees: the topology of the running requests.
        stats: counters.
    """

    # All that vLLM reads of it beside the call: its warm-up asks whether drafts are cut by their
    # confidence, and switches that off meanwhile.
    enable_adaptive_verification = False

    def __init__(self, sampler: Any, trees: TreeStore, stats: DeviceStats) -> None:
        self.sampler = sampler
        self.trees = trees
        self.stats = stats
        self.step: Step | None = None
        # The most logits rows that are sampled at once; None is what vLLM's own samplers take.
        self.max_chunk_rows: int | None = None
        # Graphs of what follows the draws, if there are any. Not held here: vLLM lets go of those
        # of its profile run, with all that they hold, where it finds them.
        self.graphs: Callable[[], AcceptGraphs | None] = lambda: None
        # Graphs move KV unseen, so there are none where moves are checked.
        self.thorough = thorough()

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
        if self.thorough:
            check_logits(logits)
        # Before penalties and temperature, as vLLM counts them.
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        rows = SampleRows.of(logits, input_batch, self.step.positions, invalid_drafts)
        dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        most = self.max_chunk_rows or get_max_chunk_logits(logits.shape[1])
        found, logprobs = self._accept(list(rows.chunks(most)), rows, dims, input_batch)
        self.stats.observe_step()
        self.step.walk = found.walk
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            (found.walk.num_accepted + 1).int(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            sampler.req_states.prefill_len.gpu,
        )
        logprobs_tensors = None
        if dims is not None:
            several = logits.shape[0] != input_batch.num_reqs
            logprobs_tensors = LogprobsTensors.cat(
                logprobs,
                input_batch.cu_num_logits_np.tolist() if several else None,
            )
        return SamplerOutput(
            sampled_token_ids=found.emitted,
            logprobs_tensors=logprobs_tensors,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _accept(
        self,
        parts: list[SampleRows],
        rows: SampleRows,
        dims: tuple[int, int] | None,
        input_batch: Any,
    ) -> tuple[Accepted, list[Any]]:
        """What is accepted, and every part's logprobs if any are wanted.

        Args:
            parts: what is sampled at once.
            rows: all of them together.
            dims: of the logprobs; None for none.
            input_batch: vLLM's ``InputBatch``.
        """
        assert self.step is not None
        by_graph = dims is None and rows.invalid is None and not self.thorough
        graphs = self.graphs() if by_graph else None
        desc = None if graphs is None else graphs.find(rows.slots.shape[0])
        if graphs is not None and desc is not None:
            assert self.step.slot_mappings is not None
            start = 0
            for part in parts:
                # Processed logits are let go of before the next part's are made.
                drawn = self._draw(part, want_logprobs=False)[0]
                graphs.buffers.drawn[start : start + drawn.shape[0]].copy_(drawn)
                start += drawn.shape[0]
            row_slots = self.step.slot_mappings[:, input_batch.logits_indices]
            self.step.kv_moved = True
            return graphs(desc, rows, row_slots), []
        done = [self._sample(part, dims) for part in parts]
        found = _joined([part for part, _ in done])
        self.stats.observe(found.num_nodes > 1, found.num_nodes, found.walk.num_accepted)
        sources = self.trees.sources[rows.slots]
        self.stats.observe_sources(sources, found.num_nodes, found.walk.path)
        return found, [logprobs for _, logprobs in done]

    def _sample(self, rows: SampleRows, dims: tuple[int, int] | None) -> tuple[Accepted, Any]:
        """Draw and walk for some requests; what holds their processed logits ends here."""
        drawn, processed = self._draw(rows, want_logprobs=dims is not None)
        first = rows.ends[:-1].long()
        scheduled = rows.ends[1:].long() - first
        if rows.invalid is not None:
            # Grammars check a draft from its start, so what is valid is a prefix.
            owner = self._owner(scheduled, drawn.shape[0])
            valid = torch.zeros_like(scheduled)
            scheduled = valid.index_add_(0, owner, (~rows.invalid).long())
        found = accept(self.trees, rows.slots, rows.tokens, drawn, first, scheduled)
        logprobs = None
        if dims is not None:
            by_processed = self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
            logits = processed if by_processed else rows.logits
            logprobs = self._logprobs(logits, found.emitted, found.walk, rows, dims)
        return found, logprobs

    def _draw(self, rows: SampleRows, want_logprobs: bool) -> tuple[Tensor, Tensor]:
        """``[rows]`` int64, the target's token at every row; and the processed logits.

        Args:
            rows: of some requests.
            want_logprobs: whether processed logits will be looked at.
        """
        return self.sampler.sample(
            rows.logits,
            rows.row_slots,
            rows.slots,
            rows.slots_np,
            rows.positions,
            rows.tokens,
            rows.row_nodes,
            rows.seq_lens_np,
            return_logprobs=want_logprobs,
        )

    def _logprobs(
        self, logits: Tensor, emitted: Tensor, found: Walk, rows: SampleRows, dims: tuple[int, int]
    ) -> Any:
        """Scores in the order that vLLM reads: row t of a request is its t-th emitted token's."""
        first = rows.ends[:-1].long()
        owner = self._owner(rows.ends[1:].long() - first, logits.shape[0])
        place = rows.row_nodes.long()
        # Rows beyond the deepest node are on no path.
        node = path_nodes(found)[owner, place.clamp(max=found.path.shape[1])]
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


def _joined(parts: list[Accepted]) -> Accepted:
    """Of consecutive requests, with paths of one width."""
    if len(parts) == 1:
        return parts[0]
    return Accepted(
        walk=Walk(
            **{name: torch.cat([getattr(p.walk, name) for p in parts]) for name in WALK_FIELDS}
        ),
        emitted=torch.cat([part.emitted for part in parts]),
        num_nodes=torch.cat([part.num_nodes for part in parts]),
    )
