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
from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.first_rank import differ, first_ranks_trees, several_ranks
from vllm_redrafter.engine.target_tables import target_tables
from vllm_redrafter.engine.v2.accept_graphs import AcceptBuffers, AcceptGraphs
from vllm_redrafter.engine.v2.draft import Draft, make_draft
from vllm_redrafter.engine.v2.draft_graphs import DraftBuffers, DraftGraphs
from vllm_redrafter.engine.v2.memory import ExtraMemory, extra_memory, widest_step
from vllm_redrafter.engine.v2.model_state import TreeModelState
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.tree.tree import Tree

logger = logging.getLogger("vllm.vllm_redrafter")


def init_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> ReDrafterSpeculator:
    """Stands in for vLLM's function of this name while our worker builds its runner."""
    return ReDrafterSpeculator(vllm_config, device)


class ReDrafterSpeculator(DraftModelSpeculator):
    """A recurrent drafter; it has no attention, so all that concerns a draft's KV is left out."""

    model_state: TreeModelState

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options = options_of(vllm_config)
        self.draft_attn_layer_names: set[str] = set()
        self.attn_groups: list[Any] = []
        self._draft: Draft | None = None
        # vLLM drops graph managers that it finds here after it has measured them.
        self._graphs: DraftGraphs | None = None
        self._accept_graphs: AcceptGraphs | None = None
        self._draft_buffers = DraftBuffers(
            self.max_num_reqs,
            self.options.num_speculative_tokens,
            vllm_config.model_config.get_hidden_size(),
            vllm_config.model_config.dtype,
            device,
        )
        self._accept_buffers = self._make_accept_buffers(groups=1)
        self._several_ranks = several_ranks()

    def _make_accept_buffers(self, groups: int) -> AcceptBuffers:
        nodes = self.options.num_speculative_tokens
        return AcceptBuffers(self.max_num_reqs, nodes, groups, self.device)

    # -- start-up --------------------------------------------------------------------------

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        embedding, lm_head = target_tables(target_model)
        drafter = load_drafter(self.options.model, embedding=embedding, lm_head=lm_head)
        return drafter.to(self.device)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter; hand the runner our ModelState, which it builds right after this."""
        if hasattr(target_model, "get_model_state_cls"):
            raise UnsupportedError(
                f"ReDrafter does not support {type(target_model).__name__}, which needs a model "
                "state of its own; use a decoder-only target with full attention in every layer."
            )
        self.model = self.load_draft_model(target_model, set())
        options = self.options
        self._draft = make_draft(
            self.model, options.beam_width, options.draft_length, options.top_k
        )
        target_model.get_model_state_cls = lambda: TreeModelState
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
        slots = input_batch.idx_mapping
        first = input_batch.cu_num_logits[:-1].long()
        step = None if dummy_run else self.model_state.step
        if step is not None and step.walk is not None:
            first = first + step.walk.last_node
        # The state that predicted the known token: that of the last accepted node.
        context = last_hidden_states[input_batch.logits_indices[first]]
        known = last_sampled.flatten()[slots]
        tree, masks = self._draft_trees(context, known, input_batch)
        if dummy_run:
            return tree.tokens[:, 1:]
        drafts = num_sampled > 0
        if self._several_ranks:
            own = tree
            tree, masks = first_ranks_trees(tree, masks)
            self.model_state.stats.observe_replaced(differ(own, tree) & drafts)
        return self.model_state.trees.put(slots, tree, masks, drafts)

    def _profile_sampling(self, hidden_states: Tensor) -> None:
        """Take the memory that sampling the widest step of trees will take.

        vLLM's profile run samples one row per request. What does not fit fails here, at start-up.

        Args:
            hidden_states: ``[max_num_batched_tokens, H]``.
        """
        rows = widest_step(self.options, self.max_num_reqs, self.max_num_tokens)
        logits = self._compute_logits(hidden_states[:rows].clone())
        chunk = min(rows, get_max_chunk_logits(logits.shape[1]))
        torch.empty(chunk, logits.shape[1], dtype=torch.float32, device=logits.device)

    def _draft_trees(self, context: Tensor, known: Tensor, input_batch: Any) -> tuple[Tree, Tensor]:
        """Trees of N + 1 columns and their masks; tests put an oracle here.

        Args:
            context: ``[B, H]``.
            known: ``[B]`` int64; means nothing for requests that have no known token yet.
        """
        if self._graphs is not None:
            return self._graphs(context, known)
        return self._draft_and_build(context, known)

    def _draft_and_build(self, context: Tensor, known: Tensor) -> tuple[Tree, Tensor]:
        assert self._draft is not None
        nodes = self.options.num_speculative_tokens
        return build_tree(self._draft(context, known), self.options.tree, nodes, fixed_size=True)
