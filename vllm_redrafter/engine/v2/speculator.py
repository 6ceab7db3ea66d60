# SPDX-License-Identifier: Apache-2.0
"""What Model Runner V2 calls to draft."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import load_config
from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.draft_guard import DraftGuard
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.first_rank import (
    differ,
    first_ranks_object,
    first_ranks_trees,
    several_ranks,
)
from vllm_redrafter.engine.target_check import check_tables
from vllm_redrafter.engine.target_shape import Shape, shape_of
from vllm_redrafter.engine.target_tables import target_tables
from vllm_redrafter.engine.v2.accept_graphs import AcceptBuffers, AcceptGraphs
from vllm_redrafter.engine.v2.draft import Draft, make_draft
from vllm_redrafter.engine.v2.draft_graphs import DraftBuffers, DraftGraphs
from vllm_redrafter.engine.v2.hybrid import TextLookup, first_nodes, hybrid_trees
from vllm_redrafter.engine.v2.memory import ExtraMemory, extra_memory, widest_step
from vllm_redrafter.engine.v2.model_state import TreeModelState, model_state_class
from vllm_redrafter.engine.v2.tree_check import no_trees, without_bad_trees
from vllm_redrafter.engine.v2.tree_store import Drafted
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.tree.candidates import FROM_DRAFTER
from vllm_redrafter.tree.walk import Walk

logger = logging.getLogger("vllm.vllm_redrafter")

# Steps between two questions whether the first tensor-parallel rank still drafts.
ASK_EVERY = 64


def init_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> ReDrafterSpeculator:
    """Stands in for vLLM's function of this name while our worker builds its runner."""
    return ReDrafterSpeculator(vllm_config, device, req_states)


class ReDrafterSpeculator(DraftModelSpeculator):
    """A recurrent drafter; it has no attention, so all that concerns a draft's KV is left out."""

    model_state: TreeModelState

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        super().__init__(vllm_config, device)
        options = self.options = options_of(vllm_config)
        self._lookup: TextLookup | None = None
        if options.prompt_lookup:
            # No chain can have more nodes than a tree.
            depth = min(options.prompt_lookup_num_tokens, options.num_speculative_tokens)
            self._lookup = TextLookup(req_states, depth)
        self.draft_attn_layer_names: set[str] = set()
        self.attn_groups: list[Any] = []
        self._draft: Draft | None = None
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        # vLLM drops graph managers that it finds here after it has measured them.
        self._graphs: DraftGraphs | None = None
        self._accept_graphs: AcceptGraphs | None = None
        self._draft_buffers = DraftBuffers(
            self.max_num_reqs,
            options.num_speculative_tokens,
            vllm_config.model_config.get_hidden_size(),
            vllm_config.model_config.dtype,
            device,
        )
        self._accept_buffers = self._make_accept_buffers(groups=1)
        self._several_ranks = several_ranks()
        self._agreements = 0
        self.draft_guard = DraftGuard(lambda: self.model_state.stats.host)
        # Nodes that are drafted, of which the first N are kept.
        self._paths = options.num_speculative_tokens
        if shape_of(vllm_config).shape is Shape.CHAIN:
            self._paths = options.chain_paths

    def _make_accept_buffers(self, groups: int) -> AcceptBuffers:
        nodes, depth = self.options.num_speculative_tokens, self.options.max_depth
        return AcceptBuffers(self.max_num_reqs, nodes, depth, groups, self.device)

    # -- start-up --------------------------------------------------------------------------

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        config = load_config(self.options.model)
        # Also looked at where only the fingerprint is compared with it.
        head = config.shared_head or config.target is not None
        embedding, lm_head = target_tables(target_model, head=head)
        drafter = load_drafter(self.options.model, embedding=embedding, lm_head=lm_head)
        check_tables(drafter.config.target, self.options, embedding, lm_head)
        return drafter.to(self.device)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter; hand the runner our ModelState, which it builds right after this."""
        if hasattr(target_model, "get_model_state_cls"):
            raise UnsupportedError(
                f"ReDrafter does not support {type(target_model).__name__}, which needs a model "
                "state of its own; use another target or leave ReDrafter out."
            )
        self.model = self.load_draft_model(target_model, set())
        options = self.options
        self._draft = make_draft(
            self.model, options.beam_width, options.draft_length, options.top_k
        )
        state_class = model_state_class(self.vllm_config)
        target_model.get_model_state_cls = lambda: state_class
        self._compute_logits = target_model.compute_logits
        if self.device.type != "cpu":
            logger.info("ReDrafter takes %s.", self.extra_memory())

    def extra_memory(self) -> ExtraMemory:
        """By the formula; a GPU's, also where there is none."""
        model = self.vllm_config.model_config
        multiprocessors = 0
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            multiprocessors = properties.multi_processor_count
        return extra_memory(
            self.options,
            self.model.config,
            max_num_seqs=self.max_num_reqs,
            max_num_batched_tokens=self.max_num_tokens,
            vocab_size=model.get_vocab_size(),
            drafter_bytes=self.model.dtype.itemsize,
            target_bytes=model.dtype.itemsize,
            head_dim=model.get_head_size(),
            multiprocessors=multiprocessors,
        )

    def set_attn(
        self,
        model_state: TreeModelState,
        kv_cache_config: Any,
        block_tables: Any,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        self.model_state = model_state
        if self._lookup is not None:
            self._lookup.starts = model_state.text_starts
        # Of vLLM's profile run; they would keep its KV cache until the real one is there.
        model_state.movers = []
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != self._accept_buffers.row_slots.shape[0]:
            self._accept_buffers = self._make_accept_buffers(groups)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Accepting and drafting get graphs where decode steps of the target have full ones."""
        self._graphs = self._accept_graphs = None
        if cudagraph_mode.decode_mode() == CUDAGraphMode.FULL:
            config, device, state = self.vllm_config, self.device, self.model_state
            self._graphs = DraftGraphs(config, device, self._draft_and_build, self._draft_buffers)
            self._accept_graphs = AcceptGraphs(config, device, state, self._accept_buffers)
            if state.tree_sampler is not None:
                state.tree_sampler.graphs = weakref.ref(self._accept_graphs)

    def capture(self) -> None:
        for graphs in (self._graphs, self._accept_graphs):
            if graphs is not None:
                graphs.capture_all()

    # -- every step ------------------------------------------------------------------------

    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """``[B, N]`` int64, the tokens of every request's next tree."""
        if is_profile:
            self._profile_sampling(last_hidden_states)
        if dummy_run:
            # Of the start: what fails here never worked.
            return self._own_trees(input_batch, last_hidden_states, last_sampled).tree.tokens[:, 1:]
        slots, trees, guard = input_batch.idx_mapping, self.model_state.trees, self.draft_guard
        nodes = self.options.num_speculative_tokens
        if num_speculative_tokens is not None:
            nodes = min(nodes, num_speculative_tokens)
        if not nodes:
            # So many requests are running that no draft pays: the drafter does not run either.
            self.model_state.stats.host.steps_without_nodes += 1
        if not nodes or guard.off:
            return trees.clear(slots)
        step, drafted = self.model_state.step, None
        walk = None if step is None else step.walk
        if not guard.gave_up:
            drafted = guard.attempt(
                "drafting",
                lambda: self._own_trees(input_batch, last_hidden_states, last_sampled, nodes, walk),
                None,
            )
        drafts = num_sampled > 0
        if self._several_ranks:
            return trees.put(slots, self._agreed(drafted, drafts), drafts)
        guard.agree(guard.gave_up)
        kept = None
        if drafted is not None:
            kept = guard.attempt("keeping trees", lambda: trees.put(slots, drafted, drafts), None)
        return trees.clear(slots) if kept is None else kept

    def _own_trees(
        self,
        input_batch: Any,
        hidden_states: Tensor,
        last_sampled: Tensor,
        nodes: int | None = None,
        walk: Walk | None = None,
    ) -> Drafted:
        """What this rank drafts behind the step.

        Args:
            input_batch: vLLM's ``InputBatch``.
            hidden_states: ``[rows, H]``.
            last_sampled: the known token of every request slot.
            nodes: that each request may have verified; None for N.
            walk: of the step; None if it held no drafts.
        """
        first = input_batch.cu_num_logits[:-1].long()
        if walk is not None:
            first = first + walk.last_node
        # The state that predicted the known token: that of the last accepted node.
        context = hidden_states[input_batch.logits_indices[first]]
        known = last_sampled.flatten()[input_batch.idx_mapping]
        most = self.options.num_speculative_tokens if nodes is None else nodes
        return self._draft_trees(context, known, input_batch, most)

    def _agreed(self, own: Drafted | None, drafts: Tensor) -> Drafted:
        """The first rank's trees. All ranks come here together, whatever became of their drafts.

        Args:
            own: this rank's; None if there are none.
            drafts: ``[B]`` bool, requests that draft.
        """
        if own is None:
            own = no_trees(drafts.shape[0], self.model_state.trees.alone)
        agreed = Drafted(*first_ranks_trees(*own))
        self.model_state.stats.observe_replaced(differ(own.tree, agreed.tree) & drafts)
        self._agreements += 1
        if self._agreements % ASK_EVERY == 0:
            # Between hosts: until then a first rank that gave up sends roots alone.
            self.draft_guard.agree(first_ranks_object(self.draft_guard.gave_up))
        return agreed

    def _profile_sampling(self, hidden_states: Tensor) -> None:
        """Take the memory that sampling the widest step of trees will take.

        vLLM's profile run samples one row per request. What does not fit fails here, at start-up.

        Args:
            hidden_states: ``[max_num_batched_tokens, H]``.
        """
        rows = widest_step(self.options, self.max_num_reqs, self.max_num_tokens)
        if self.vllm_config.lora_config is None:
            logits = self._compute_logits(hidden_states[:rows].clone())
        else:
            # Adapters were told of a profile run's rows, a row per request.
            vocab_size = self.vllm_config.model_config.get_vocab_size()
            logits = hidden_states.new_empty(rows, vocab_size)
        chunk = min(rows, get_max_chunk_logits(logits.shape[1]))
        torch.empty(chunk, logits.shape[1], dtype=torch.float32, device=logits.device)

    def _draft_trees(self, context: Tensor, known: Tensor, input_batch: Any, nodes: int) -> Drafted:
        """Trees of N + 1 columns; tests put an oracle here.

        Args:
            context: ``[B, H]``.
            known: ``[B]`` int64; means nothing for requests that have no known token yet.
            input_batch: vLLM's ``InputBatch``.
            nodes: that each request may have verified; 1 to N.
        """
        draft = self._draft_and_build if self._graphs is None else self._graphs
        counts = torch.full_like(known, nodes)
        return draft(context, known, input_batch.idx_mapping, counts)

    def _draft_and_build(
        self, context: Tensor, known: Tensor, slots: Tensor, counts: Tensor
    ) -> Drafted:
        assert self._draft is not None
        nodes, beams = self.options.num_speculative_tokens, self._draft(context, known)
        paths = max(self._paths, nodes)
        if self._lookup is not None:
            most = counts if paths == nodes else torch.full_like(counts, paths)
            drafted = hybrid_trees(beams, self._lookup(slots), paths, most)
        else:
            # vLLM cuts these to their first nodes.
            tree, masks = build_tree(beams, self.options.tree, paths, fixed_size=True)
            drafted = Drafted(tree, masks, torch.full_like(tree.tokens, FROM_DRAFTER))
        if paths > nodes:
            # The best chain comes first.
            drafted = first_nodes(drafted, nodes, counts)
        # vLLM's first profile run comes before there is a state.
        state = getattr(self, "model_state", None)
        if state is None:
            return drafted
        sound, bad = without_bad_trees(drafted, state.trees.alone, self._vocab_size)
        state.stats.observe_bad_trees(bad)
        return sound
