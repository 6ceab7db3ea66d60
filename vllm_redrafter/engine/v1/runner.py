# SPDX-License-Identifier: Apache-2.0
"""The seam to vLLM's Model Runner V1: six overrides, each a few lines around one call of ours.

The scheduler only sees token lists; a tree's topology stays here, by request id. Nodes are in
topological order with the best chain first, so any prefix to which the scheduler cuts a list is
still a valid tree, and a list that is no such prefix is verified as a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput

from vllm_redrafter.engine.cpu_attention import take_over
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.first_rank import first_ranks_object, several_ranks
from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep
from vllm_redrafter.engine.v1.request_tree import RequestTree, chain, chain_masks, mask_words
from vllm_redrafter.engine.v1.walk import (
    BatchWalk,
    GreedyDraw,
    SampledDraw,
    stack_logprobs,
    walk_trees,
)
from vllm_redrafter.ops.move_kv import MoveKV


@dataclass
class _Step:
    """One engine step between ``_prepare_inputs`` and ``propose_draft_token_ids``.

    Attributes:
        trees: per batch row, what is verified; None where nothing was drafted.
        first_row: per batch row, its first query row.
        row_count: per batch row, its query rows; the drafted nodes are the last of them.
        first_logit: per batch row, the logits row of its root.
        walk: set once the step was sampled.
    """

    trees: list[RequestTree | None]
    first_row: np.ndarray
    row_count: np.ndarray
    first_logit: list[int]
    walk: BatchWalk | None = None

    def root_row(self, i: int) -> int:
        """Query row of batch row i's root, the last token before its drafted nodes."""
        tree = self.trees[i]
        return int(self.first_row[i] + self.row_count[i]) - 1 - (len(tree) if tree else 0)

    def holds_tree(self, i: int) -> bool:
        """Whether batch row i branches, so that vLLM's causal attention would be wrong for it."""
        tree = self.trees[i]
        return tree is not None and not tree.is_chain


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


class TreeRunnerMixin:
    """Tree verification for a Model Runner V1; mixed in before the runner's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.redrafter_stats = ReDrafterStats()
        self._options = options_of(self.vllm_config)
        self._trees: dict[str, RequestTree] = {}
        self._step: _Step | None = None
        # Widest row of a request that our attention takes over from vLLM's.
        self._max_rows = 1 + self.num_spec_tokens
        self._chain_masks = torch.from_numpy(chain_masks(self._max_rows))
        self._movers: list[MoveKV] = []
        self._several_ranks = several_ranks()

    # -- start-up --------------------------------------------------------------------------

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        layers = self.compilation_config.static_forward_context
        self._movers = []
        for group in self.kv_cache_config.kv_cache_groups:
            members = {name: layers[name] for name in group.layer_names}
            self._movers.append(take_over(members))
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            # Beside speculation it looks for a row per drafted token; our draws, like vLLM's steps
            # without drafts, have one row per request, and another one's would be forced.
            holder.in_spec_mode = False

    # -- before the forward pass -----------------------------------------------------------

    def _update_states(self, scheduler_output: Any) -> Any:
        self._step = None
        for req_id in scheduler_output.finished_req_ids:
            self._trees.pop(req_id, None)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        with self.redrafter_stats.timed("prepare"):
            scheduled = scheduler_output.scheduled_spec_decode_tokens
            req_ids = self.input_batch.req_ids
            trees = [self._tree_to_verify(req_id, scheduled.get(req_id)) for req_id in req_ids]
            first_row = np.cumsum(num_scheduled_tokens) - num_scheduled_tokens
            logits_rows = [1 + (len(tree) if tree is not None else 0) for tree in trees]
            first_logit = [0, *np.cumsum(logits_rows[:-1]).tolist()]
            self._step = _Step(trees, first_row, num_scheduled_tokens, first_logit)
            self._set_tree_positions(self._step)
        return result

    def _tree_to_verify(self, req_id: str, scheduled: list[int] | None) -> RequestTree | None:
        tree = self._trees.pop(req_id, None)
        if not scheduled:
            return None
        if tree is not None and scheduled == tree.tokens[: len(scheduled)]:
            return tree.first(len(scheduled))
        # Padding of the scheduler, or a list that we did not draft in this shape.
        self.redrafter_stats.fall_back("a schedule that is no prefix of the draft")
        return chain(scheduled)

    def _set_tree_positions(self, step: _Step) -> None:
        """Node positions: the root's plus the depth. Slots stay as computed, by node index."""
        positions = self.positions
        for i, tree in enumerate(step.trees):
            if not step.holds_tree(i):
                continue
            root = step.root_row(i)
            depths = torch.from_numpy(tree.depths).to(positions.dtype)
            positions[root + 1 : root + 1 + len(tree)] = positions[root] + depths

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        step = self._step
        if step is not None and any(map(step.holds_tree, range(len(step.trees)))):
            with self.redrafter_stats.timed("prepare"):
                tree_step = self._tree_step(step)
            for layer_metadata in {id(m): m for m in metadata.values()}.values():
                setattr(layer_metadata, STEP_ATTRIBUTE, tree_step)
        return metadata, common

    def _tree_step(self, step: _Step) -> TreeStep:
        """Rows for our attention: all of the step if they are few, else the trees alone."""
        roots = [step.root_row(i) for i in range(len(step.trees))]
        # A row before a root (a prompt's rest) is vLLM's to compute.
        covers_all = all(
            count <= self._max_rows and (not step.holds_tree(i) or roots[i] == first)
            for i, (first, count) in enumerate(zip(step.first_row, step.row_count, strict=True))
        )
        masks = torch.zeros(
            int(step.row_count.sum()), mask_words(self._max_rows), dtype=torch.int64
        )
        covered, starts, counts = [], [], []
        for i, tree in enumerate(step.trees):
            if step.holds_tree(i):
                start, mask = roots[i], torch.from_numpy(tree.masks)
            elif covers_all:
                start = int(step.first_row[i])
                mask = self._chain_masks[: int(step.row_count[i])]
            else:
                continue
            masks[start : start + len(mask), : mask.shape[1]] = mask
            covered.append(i)
            starts.append(start)
            counts.append(len(mask))
        index = np.array(covered)
        row_start = np.array(starts)
        context = (
            self.input_batch.num_computed_tokens_cpu[index] + row_start - step.first_row[index]
        )
        return TreeStep(
            request_index=_int32(index),
            row_start=_int32(row_start),
            row_count=_int32(np.array(counts)),
            context_lens=_int32(context),
            masks=masks,
            covers_all=covers_all,
        )

    # -- after the forward pass ------------------------------------------------------------

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        step = self._step
        if step is None or logits is None or spec_decode_metadata is None:
            return super()._sample(logits, spec_decode_metadata)
        with self.redrafter_stats.timed("walk"):
            metadata, logprobs = self.input_batch.sampling_metadata, None
            if self._all_plain_greedy(metadata):
                draw = GreedyDraw(logits, self.sampler)
                step.walk = walk_trees(step.trees, step.first_logit, draw)
            else:
                outputs = self.input_batch.req_output_token_ids
                with SampledDraw(logits, self.sampler, metadata, outputs) as sampled_draw:
                    step.walk = walk_trees(step.trees, step.first_logit, sampled_draw)
                logprobs = stack_logprobs(sampled_draw.logprobs)
            self._observe(step)
            return SamplerOutput(
                sampled_token_ids=step.walk.padded_tokens(), logprobs_tensors=logprobs
            )

    def _all_plain_greedy(self, metadata: Any) -> bool:
        """Whether every request takes the plain argmax, nothing masked, penalised or recorded."""
        holder = metadata.thinking_budget_state_holder
        return (
            metadata.all_greedy
            and metadata.max_num_logprobs is None
            and not metadata.logprob_token_ids
            and metadata.no_penalties
            and metadata.allowed_token_ids_mask is None
            and not metadata.bad_words_token_ids
            and not (holder is not None and holder.has_tracked_requests())
            and not any(self._needs_min_tokens(req_id) for req_id in self.input_batch.req_ids)
        )

    def _needs_min_tokens(self, req_id: str) -> bool:
        state = self.requests[req_id]
        return state.sampling_params.min_tokens > len(state.output_token_ids)

    def _observe(self, step: _Step) -> None:
        stats, walk = self.redrafter_stats, step.walk
        drafted = [i for i, tree in enumerate(step.trees) if tree is not None]
        stats.steps += bool(drafted)
        for i in drafted:
            stats.observe(len(step.trees[i]), len(walk.paths[i]))

    def _update_states_after_model_execute(
        self, output_token_ids: Tensor, scheduler_output: Any
    ) -> None:
        super()._update_states_after_model_execute(output_token_ids, scheduler_output)
        step = self._step
        if step is None or step.walk is None:
            return
        with self.redrafter_stats.timed("move"):
            self._move_accepted(step)

    def _move_accepted(self, step: _Step) -> None:
        """Make every accepted path's KV contiguous behind its root, in all layers."""
        sources: list[int] = []
        destinations: list[int] = []
        for i, path in enumerate(step.walk.paths):
            root = step.root_row(i)
            for depth, node in enumerate(path, start=1):
                if node != depth:
                    sources.append(root + node)
                    destinations.append(root + depth)
        if not sources:
            return
        self.redrafter_stats.moves += len(sources)
        for gid, mover in enumerate(self._movers):
            slots = self.input_batch.block_table[gid].slot_mapping.gpu
            mover(slots[sources], slots[destinations])

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # The stock check would blank the whole batch's drafts when one request nears
        # max_model_len; ours ends drafting per request in `_may_draft`.
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        step, req_ids = self._step, self.input_batch.req_ids
        drafts: list[list[int]] = [[] for _ in req_ids]
        if step is None or step.walk is None:
            return drafts
        self._step = None
        drafting, rows, known = [], [], []
        for i, tokens in enumerate(sampled_token_ids):
            # A chunked prefill that goes on has no sampled token.
            if tokens and self._may_draft(req_ids[i]):
                path = step.walk.paths[i]
                drafting.append(i)
                rows.append(step.first_logit[i] + (path[-1] if path else 0))
                known.append(tokens[-1])
        most_nodes = self._options.nodes_for(len(req_ids))
        if not drafting or not most_nodes:
            return drafts
        trees = self._draft_trees(drafting, sample_hidden_states[rows], known)
        if self._several_ranks:
            trees = self._first_ranks_trees(trees)
        for i, tree in zip(drafting, trees, strict=True):
            if self.requests[req_ids[i]].sampling_params.structured_outputs is not None:
                # A grammar advances along one sequence of tokens.
                self.redrafter_stats.fall_back("structured output (chain)")
                tree = tree.first(tree.chain_length)
            tree = tree.first(most_nodes)
            self._trees[req_ids[i]] = tree
            drafts[i] = tree.tokens
        return drafts

    def _draft_trees(
        self, drafting: list[int], context: Tensor, known: list[int]
    ) -> list[RequestTree]:
        """One tree for each batch row in ``drafting``; tests put an oracle here."""
        with self.redrafter_stats.timed("draft"):
            beams = self.drafter.draft(context, known)
        with self.redrafter_stats.timed("tree"):
            return self.drafter.trees(beams)

    def _first_ranks_trees(self, trees: list[RequestTree]) -> list[RequestTree]:
        with self.redrafter_stats.timed("agree"):
            agreed = first_ranks_object(trees)
        self.redrafter_stats.replaced += sum(
            own.tokens != other.tokens or own.parents != other.parents
            for own, other in zip(trees, agreed, strict=True)
        )
        return agreed

    def _may_draft(self, req_id: str) -> bool:
        """False for requests that end with the next token, or for which drafting is unproven."""
        state = self.requests[req_id]
        params = state.sampling_params
        left = self.max_model_len - state.num_tokens
        if params.max_tokens is not None:
            left = min(left, params.max_tokens - len(state.output_token_ids))
        if left <= 1:
            return False
        reason = None
        if state.lora_request is not None:
            reason = "LoRA (no draft)"
        elif state.prompt_embeds is not None:
            reason = "prompt embeddings (no draft)"
        elif getattr(params, "thinking_token_budget", None) is not None:
            reason = "a thinking token budget (no draft)"
        if reason:
            self.redrafter_stats.fall_back(reason)
        return reason is None
