# SPDX-License-Identifier: Apache-2.0
"""The seam to vLLM's Model Runner V1: six overrides, each a few lines around one call of ours.

The scheduler only sees token lists; a tree's topology stays here, by request id. Nodes are in
topological order with the best chain first, so any prefix to which the scheduler cuts a list is
still a valid tree, and a list that is no such prefix is verified as a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput

from vllm_redrafter.budget.costs import CostTable, DraftShape
from vllm_redrafter.budget.model import CostModel
from vllm_redrafter.budget.planner import draft_shapes
from vllm_redrafter.engine.cpu_attention import take_over
from vllm_redrafter.engine.draft_guard import DraftGuard
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.first_rank import first_ranks_object, is_first_rank, several_ranks
from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.target_shape import Shape, shape_of
from vllm_redrafter.engine.thorough import check_logits, checked_move, thorough
from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep
from vllm_redrafter.engine.v1.calibrate import (
    attend_to_nothing,
    cost_table,
    identity_of,
    measure,
)
from vllm_redrafter.engine.v1.clock import StepClock
from vllm_redrafter.engine.v1.drafting import Drafting, DraftInput
from vllm_redrafter.engine.v1.ending import Ending, is_stop_token
from vllm_redrafter.engine.v1.grammars import Grammars
from vllm_redrafter.engine.v1.held_seeds import HeldSeeds
from vllm_redrafter.engine.v1.logits_processors import (
    REASON,
    all_processors,
    custom_may_change,
    may_change_argmax,
)
from vllm_redrafter.engine.v1.request_tree import (
    NOTHING,
    RequestTree,
    chain,
    chain_masks,
    mask_words,
)
from vllm_redrafter.engine.v1.step_check import check_tree_step, check_trees
from vllm_redrafter.engine.v1.tree_check import BadTree, problem_of
from vllm_redrafter.engine.v1.walk import (
    BatchWalk,
    Ends,
    GreedyDraw,
    SampledDraw,
    stack_logprobs,
    walk_trees,
)
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.tree.grammar import Matcher, allowed_nodes


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


def _moves(step: _Step) -> tuple[list[int], list[int]]:
    """Query rows of accepted nodes that lie elsewhere than behind their root, and where to."""
    assert step.walk is not None
    sources: list[int] = []
    destinations: list[int] = []
    for i, path in enumerate(step.walk.paths):
        root = step.root_row(i)
        for depth, node in enumerate(path, start=1):
            if node != depth:
                sources.append(root + node)
                destinations.append(root + depth)
    return sources, destinations


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


class TreeRunnerMixin:
    """Tree verification for a Model Runner V1; mixed in before the runner's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with all_processors():
            super().__init__(*args, **kwargs)
        self.redrafter_stats = ReDrafterStats()
        self._options = options_of(self.vllm_config)
        self._trees: dict[str, RequestTree] = {}
        self._step: _Step | None = None
        # Whether a request said its last token in this step, as far as is known here.
        self.someone_ended = False
        # Whether no tree of the target's can be verified, see ``target_shape``.
        self._chains = shape_of(self.vllm_config).shape is Shape.CHAIN
        self._drafting = self._make_drafting()
        self._clock = StepClock()
        self.draft_guard = DraftGuard(lambda: self.redrafter_stats)
        self._thorough = thorough()
        # Widest row of a request that our attention takes over from vLLM's.
        self._max_rows = 1 + self.num_spec_tokens
        self._chain_masks = torch.from_numpy(chain_masks(self._max_rows))
        self._movers: list[MoveKV] = []
        self._held_seeds = HeldSeeds()
        self._several_ranks = several_ranks()
        self._first_rank = is_first_rank()
        self._grammars = Grammars(self.vllm_config, alone=not self._several_ranks)
        self._matchers: dict[int, Matcher] = {}

    # -- start-up --------------------------------------------------------------------------

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        layers = self.compilation_config.static_forward_context
        self._movers = []
        # Chains are left to vLLM's own attention, and nothing of them has to move.
        for group in () if self._chains else self.kv_cache_config.kv_cache_groups:
            members = {name: layers[name] for name in group.layer_names}
            self._movers.append(take_over(members))
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            # Beside speculation it looks for a row per drafted token; our draws, like vLLM's steps
            # without drafts, have one row per request, and another one's would be forced.
            holder.in_spec_mode = False

    def measure_costs(self) -> None:
        """Give the node budget its costs; the model and its KV cache are there by now."""
        if self._options.node_budget == "fixed":
            return
        self._drafting = self._make_drafting(
            CostModel(cost_table(self, self._options, self._shapes))
        )

    def _make_drafting(self, costs: CostModel | None = None) -> Drafting:
        return Drafting(
            self._options, self._run_drafter, lambda: self.redrafter_stats, costs, self._chains
        )

    def measured_costs(self) -> CostTable:
        """Measured now, whatever is kept."""
        return measure(self, self._shapes, identity_of(self, self._options))

    @property
    def _shapes(self) -> list[DraftShape]:
        return draft_shapes(self._options.beam_width, self._options.draft_length)

    def attend_to_nothing(self, rows: int, context: int) -> int:
        """One layer's tree attention over whatever the cache holds, to be timed.

        Returns:
            how many layers there are like it. What layers with a window take does not grow with
            the context: they count only where there are no others.
        """
        layers = [
            layer
            for layer in self.compilation_config.static_forward_context.values()
            if hasattr(getattr(layer, "impl", None), "redrafter_maps")
        ]
        layers = [layer for layer in layers if not layer.impl.redrafter_window] or layers
        if not layers:
            return 0
        attend_to_nothing(layers[0], rows, context)
        return len(layers)

    # -- before the forward pass -----------------------------------------------------------

    def _update_states(self, scheduler_output: Any) -> Any:
        self._step, self.someone_ended = None, False
        self._learn(self._note_time, scheduler_output)
        for req_id in scheduler_output.finished_req_ids:
            self._trees.pop(req_id, None)
            self._grammars.forget(req_id)
            self._learn(self._drafting.forget, req_id)
        return super()._update_states(scheduler_output)

    def _learn(self, note: Callable[..., None], *args: Any) -> None:
        """What the next drafts may take into account, and nothing else depends on."""
        self.draft_guard.attempt("the budget's notes", lambda: note(*args), None)

    def _note_time(self, scheduler_output: Any) -> None:
        """The step before this one is over; what it took corrects the costs."""
        seconds = self._clock.lap(scheduler_output.num_scheduled_tokens)
        costs, timed = self._drafting.costs, self._clock.timed
        if seconds is None or costs is None or timed is None:
            return
        self.redrafter_stats.time_step(
            float(costs.step(timed.rows, timed.requests, timed.attended)) + timed.draft_seconds,
            seconds,
            timed.rows > timed.requests,
        )
        costs.observe_step(
            timed.rows, timed.requests, timed.attended, seconds - timed.draft_seconds
        )

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        with self.redrafter_stats.timed("prepare"):
            scheduled = scheduler_output.scheduled_spec_decode_tokens
            req_ids = self.input_batch.req_ids
            trees = [self._tree_to_verify(req_id, scheduled.get(req_id)) for req_id in req_ids]
            self._grammars.verified = {
                req_id: tree
                for req_id, tree in zip(req_ids, trees, strict=True)
                if tree is not None and not tree.is_chain
            }
            first_row = np.cumsum(num_scheduled_tokens) - num_scheduled_tokens
            logits_rows = [1 + (len(tree) if tree is not None else 0) for tree in trees]
            first_logit = [0, *np.cumsum(logits_rows[:-1]).tolist()]
            self._step = _Step(trees, first_row, num_scheduled_tokens, first_logit)
            self._set_tree_positions(self._step)
            if self._thorough:
                check_trees(self._step, self.positions, self.model_config.get_vocab_size())
            self._learn(
                self._clock.start, list(req_ids), int(num_scheduled_tokens.sum()),
                sum(logits_rows), int(self._attended(num_scheduled_tokens)),
            )  # fmt: skip
        return result

    def _attended(self, num_scheduled_tokens: np.ndarray) -> float:
        """Tokens of context, summed over the step's rows."""
        contexts = self.input_batch.num_computed_tokens_cpu[: len(num_scheduled_tokens)]
        return float((contexts * num_scheduled_tokens).sum())

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
            if self._thorough:
                check_tree_step(step, tree_step)
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
        unfinished = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        self._held_seeds.hold(self.input_batch.generators, unfinished.tolist())
        step = self._step
        if step is None or logits is None or spec_decode_metadata is None:
            return super()._sample(logits, spec_decode_metadata)
        metadata, logprobs = self.input_batch.sampling_metadata, None
        plain_greedy = self._all_plain_greedy(metadata)
        if not plain_greedy and not any(step.trees):
            step.walk = BatchWalk.nowhere(len(step.trees))
            return super()._sample(logits, None)
        if self._thorough:
            check_logits(logits)
        with self.redrafter_stats.timed("walk"):
            endings = self._endings(step)
            if plain_greedy:
                draw = GreedyDraw(logits)
                step.walk = walk_trees(step.trees, step.first_logit, draw, endings)
            else:
                outputs = self.input_batch.req_output_token_ids
                with SampledDraw(logits, self.sampler, metadata, outputs) as sampled_draw:
                    step.walk = walk_trees(
                        step.trees, step.first_logit, sampled_draw, endings
                    )
                logprobs = stack_logprobs(sampled_draw.logprobs)
            self._observe(step)
            return SamplerOutput(
                sampled_token_ids=step.walk.padded_tokens(), logprobs_tensors=logprobs
            )

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self._held_seeds.give_back(self.input_batch.generators)

    def _endings(self, step: _Step) -> Ends:
        """Where the requests of a step end; made before their outputs grow."""
        endings = {}
        for i, tree in enumerate(step.trees):
            if tree is not None:
                req_id = self.input_batch.req_ids[i]
                state = self.requests[req_id]
                endings[i] = Ending(
                    state.sampling_params, state.output_token_ids, self._tokens_left(req_id)
                )
        return lambda i, said: endings[i](said)

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
            and not may_change_argmax(metadata.logitsprocs)
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
            self._learn(
                self._drafting.observe, self.input_batch.req_ids[i], step.trees[i], walk.paths[i],
                float(self.input_batch.temperature_cpu[i]),
            )  # fmt: skip

    def _update_states_after_model_execute(
        self, output_token_ids: Tensor, scheduler_output: Any
    ) -> None:
        super()._update_states_after_model_execute(output_token_ids, scheduler_output)
        step = self._step
        if step is None or step.walk is None:
            return
        if self._thorough:
            self._checked_move(step)
            return
        with self.redrafter_stats.timed("move"):
            self._move_accepted(step)

    def _move_accepted(self, step: _Step) -> None:
        """Make every accepted path's KV contiguous behind its root, in all layers."""
        sources, destinations = _moves(step)
        if not sources:
            return
        self.redrafter_stats.moves += len(sources)
        for gid, mover in enumerate(self._movers):
            slots = self._slots(gid)
            mover(slots[sources], slots[destinations])

    def _slots(self, gid: int) -> Tensor:
        """Where the step's rows are in a KV cache group."""
        return self.input_batch.block_table[gid].slot_mapping.gpu

    def _checked_move(self, step: _Step) -> None:
        sources, destinations = _moves(step)
        groups = map(self._slots, range(len(self.kv_cache_config.kv_cache_groups)))
        slots = [(of_group[sources], of_group[destinations]) for of_group in groups]
        checked_move(self._movers, slots, lambda: self._move_accepted(step))

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
        most_nodes = self._options.nodes_for(len(req_ids))
        if not most_nodes or self.draft_guard.off:
            return drafts
        drafting, rows, known = [], [], []
        for i, tokens in enumerate(sampled_token_ids):
            if not tokens:
                continue  # a chunked prefill that goes on
            if self._ends(req_ids[i], tokens[-1]):
                self.someone_ended = True
            elif self._may_draft(req_ids[i]):
                path = step.walk.paths[i]
                drafting.append(i)
                rows.append(step.first_logit[i] + (path[-1] if path else 0))
                known.append(tokens[-1])
        self._grammars.drafted = {}
        if not drafting:
            return drafts
        self._matchers = self.draft_guard.attempt(
            "asking grammars", lambda: self._ask_grammars(drafting, sampled_token_ids), {}
        )
        trees = self._own_trees(drafting, lambda: sample_hidden_states[rows], known)
        if self._several_ranks:
            trees = self._first_ranks_trees(trees)
        else:
            self.draft_guard.agree(self.draft_guard.gave_up)
        for i, tree in zip(drafting, trees, strict=True):
            if not len(tree):
                continue
            if self._chains:
                tree = tree.first(tree.chain_length)
            elif self.requests[req_ids[i]].sampling_params.structured_outputs is not None:
                tree = self._under_grammar(i, tree)
                if not len(tree):
                    continue
            tree = tree.first(most_nodes)
            self._trees[req_ids[i]] = tree
            drafts[i] = tree.tokens
        self.redrafter_stats.steps_without_nodes += not any(drafts)
        return drafts

    def _ask_grammars(
        self, drafting: list[int], said: list[list[int]]
    ) -> dict[int, Matcher]:
        """By batch row, the grammars of requests that may have a tree all the same."""
        matchers: dict[int, Matcher] = {}
        # Apple's rule knows nothing of what may follow; a chain is the scheduler's to cut.
        if self._chains or self._options.tree != "best":
            return matchers
        for i in drafting:
            req_id = self.input_batch.req_ids[i]
            if self.requests[req_id].sampling_params.structured_outputs is not None:
                matcher = self._grammars.matcher(req_id, said[i])
                if matcher is not None:
                    matchers[i] = matcher
        return matchers

    def _under_grammar(self, i: int, tree: RequestTree) -> RequestTree:
        """What of a tree may be drafted for a request with a grammar."""
        matcher = self._matchers.get(i)
        if matcher is None:
            # vLLM's scheduler advances a grammar along one sequence of tokens.
            self.redrafter_stats.fall_back("structured output (chain)")
            return tree.first(tree.chain_length)
        kept = self.draft_guard.attempt(
            "asking grammars", lambda: allowed_nodes(tree.tokens, tree.parents, matcher), []
        )
        tree = tree.only(kept).first(self._options.nodes_for(len(self.input_batch.req_ids)))
        self._grammars.drafted[self.input_batch.req_ids[i]] = tree
        return tree

    def _own_trees(
        self, drafting: list[int], context: Callable[[], Tensor], known: list[int]
    ) -> list[RequestTree]:
        """This rank's trees, ``NOTHING`` where one could not be made or is none."""
        guard, nothing = self.draft_guard, [NOTHING] * len(drafting)
        if guard.gave_up:
            return nothing

        def draft() -> list[RequestTree]:
            trees = self._draft_trees(drafting, context(), known)
            if len(trees) != len(drafting):
                raise BadTree(f"{len(trees)} trees were drafted for {len(drafting)} requests")
            return trees

        trees = guard.attempt("drafting", draft, nothing)
        return guard.attempt("checking trees", lambda: self._sound(trees), nothing)

    def _sound(self, trees: list[RequestTree]) -> list[RequestTree]:
        """``NOTHING`` in place of those that are no trees."""
        sound, vocab_size = list(trees), self.model_config.get_vocab_size()
        for i, tree in enumerate(trees):
            problem = problem_of(tree, vocab_size)
            if problem:
                sound[i] = NOTHING
                self.draft_guard.failed("checking trees", BadTree(problem))
        return sound

    def _draft_trees(
        self, drafting: list[int], context: Tensor, known: list[int]
    ) -> list[RequestTree]:
        """One tree for each batch row in ``drafting``; tests put an oracle here."""
        if self._leaves_drafts_to_the_first_rank:
            return [NOTHING] * len(drafting)
        batch, rows = self.input_batch, np.array(drafting, dtype=np.int32)
        before = self.redrafter_stats.seconds["draft"]
        trees = self._drafting(
            DraftInput(
                requests=[batch.req_ids[i] for i in drafting],
                context=context,
                known=known,
                text=batch.token_ids_cpu_tensor,
                rows=rows,
                starts=self._text_starts(drafting),
                lengths=batch.num_tokens_no_spec[rows].astype(np.int32),
                temperatures=batch.temperature_cpu[rows],
                # Deeper tokens could not be said any more.
                max_depth=np.array([self._tokens_left(batch.req_ids[i]) - 1 for i in drafting]),
                most_nodes=self._options.nodes_for(len(batch.req_ids)),
                most_rows=self.scheduler_config.max_num_batched_tokens,
                matchers={b: self._matchers[i] for b, i in enumerate(drafting)
                          if i in self._matchers},
            )
        )
        self._clock.drafted(self.redrafter_stats.seconds["draft"] - before)
        return trees

    def _text_starts(self, drafting: list[int]) -> np.ndarray:
        """``[B]`` int32, the prompt's length where the prompt is embeddings, else 0."""
        batch = self.input_batch
        embedded = [self.requests[batch.req_ids[i]].prompt_embeds is not None for i in drafting]
        return np.where(embedded, batch.num_prompt_tokens[drafting], 0).astype(np.int32)

    @property
    def _leaves_drafts_to_the_first_rank(self) -> bool:
        """With a measured budget: times differ between ranks, and so would their trees."""
        return self._several_ranks and not self._first_rank and self._drafting.costs is not None

    def _run_drafter(self, context: Tensor, known: list[int], shape: tuple[int, int]) -> Any:
        return self.drafter.draft(context, known, shape)

    def _first_ranks_trees(self, trees: list[RequestTree]) -> list[RequestTree]:
        guard = self.draft_guard
        with self.redrafter_stats.timed("agree"):
            agreed, first_gave_up = first_ranks_object((trees, guard.gave_up))
        guard.agree(first_gave_up)
        if self._leaves_drafts_to_the_first_rank:
            return agreed
        self.redrafter_stats.replaced += sum(
            own.tokens != other.tokens or own.parents != other.parents
            for own, other in zip(trees, agreed, strict=True)
        )
        return agreed

    def _ends(self, req_id: str, token: int) -> bool:
        """Whether a request ends with this token or the next: nothing is drafted for it.

        A session that waits for its next turn would be given the draft of the one before.
        """
        params = self.requests[req_id].sampling_params
        return self._tokens_left(req_id) <= 1 or is_stop_token(token, params)

    def _may_draft(self, req_id: str) -> bool:
        """False for requests where drafting is unproven."""
        params = self.requests[req_id].sampling_params
        reason, batch = None, self.input_batch
        if custom_may_change(batch.logitsprocs, batch.req_id_to_index[req_id]):
            reason = REASON
        elif getattr(params, "thinking_token_budget", None) is not None:
            reason = "a thinking token budget (no draft)"
        if reason:
            self.redrafter_stats.fall_back(reason)
        return reason is None

    def _tokens_left(self, req_id: str) -> int:
        """How many more tokens the request may say."""
        state = self.requests[req_id]
        left = self.max_model_len - state.num_tokens
        if state.sampling_params.max_tokens is not None:
            left = min(left, state.sampling_params.max_tokens - len(state.output_token_ids))
        return left
