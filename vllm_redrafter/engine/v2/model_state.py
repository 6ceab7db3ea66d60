# SPDX-License-Identifier: Apache-2.0
"""The hooks of Model Runner V2 around the target's forward pass.

In the runner's order: ``add_request``; then each step ``preprocess_state`` (rows of logits),
``prepare_attn`` (which rows hold trees), ``prepare_inputs`` (positions by depth), the forward pass,
``TreeSampler``, and ``postprocess_state`` (the accepted path's KV moves behind its root, where no
CUDA graph has moved it with the walk). None reads the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.target_shape import Shape as TargetShape
from vllm_redrafter.engine.target_shape import check_states, shape_of
from vllm_redrafter.engine.thorough import checked_move, thorough
from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep
from vllm_redrafter.engine.v2.accept import kv_moves
from vllm_redrafter.engine.v2.attention import take_over
from vllm_redrafter.engine.v2.fallback import shape_of_request, stop_tokens
from vllm_redrafter.engine.v2.logits_processors import REASON, watch_custom
from vllm_redrafter.engine.v2.sampler import Step, TreeSampler
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.step_check import check_tree_step, check_trees
from vllm_redrafter.engine.v2.step_rows import StepRows
from vllm_redrafter.engine.v2.tree_store import Shape, TreeStore
from vllm_redrafter.ops.move_kv import MoveKV


def _stay(source: Tensor, target: Tensor) -> None:
    """In place of ``MoveKV`` where nothing has to move."""


class TreeModelState(DefaultModelState):
    """A decoder-only target whose drafts are trees."""

    supports_prompt_embeds = True

    def __init__(
        self, vllm_config: Any, model: torch.nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        options = options_of(vllm_config)
        nodes, depth = options.num_speculative_tokens, options.max_depth
        self.trees = TreeStore(self.max_num_reqs, nodes, depth, device)
        self.stats = DeviceStats(depth, device)
        self.step: Step | None = None
        self.movers: list[MoveKV] = []
        self.tree_sampler: TreeSampler | None = None
        self.rows = StepRows(self.trees, self.max_num_tokens, options.tree_rows(self.max_num_reqs))
        # Of fixed address, so that a CUDA graph can read them.
        self.text_starts = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self._slot_mappings: Tensor | None = None
        self._thorough = thorough()
        # Whether no tree of the target's can be verified, see ``target_shape``.
        self._chains = shape_of(vllm_config).shape is TargetShape.CHAIN
        # [B], of the step, for adapters of the output head.
        self.logits_rows = np.ones(0, dtype=np.int64)

    # -- requests --------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        shape, reason = shape_of_request(new_req_data)
        if self._chains and shape != Shape.NOTHING:
            shape, reason = Shape.CHAIN, ""
        if reason:
            self.stats.host.fall_back(reason)
        self.trees.reset(req_index, shape)
        # Embeddings are no tokens to look up.
        embedded = new_req_data.prompt_embeds is not None
        self.text_starts[req_index].fill_(len(new_req_data.prompt_embeds) if embedded else 0)
        params = new_req_data.sampling_params
        if params is not None:
            longest = self.model_config.max_model_len
            if params.max_tokens is not None:
                longest = min(longest, new_req_data.prompt_len + params.max_tokens)
            stops = () if shape == Shape.NOTHING else stop_tokens(params)
            self.trees.endings.reset(req_index, stops, longest)

    def _no_branches(self, req_index: int) -> None:
        """A custom logits processor may change this request, which came with this step."""
        self.trees.limit(req_index, Shape.CHAIN)
        if not self._chains:
            self.stats.host.fall_back(REASON)

    # -- start-up --------------------------------------------------------------------------

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        for name in ("return_sampling_mask", "enable_trace_replay"):
            if getattr(self.model_config, name, False):
                raise UnsupportedError(f"ReDrafter does not support {name}; leave it off.")
        self.trees.endings.lengths = sampler.req_states.total_len.gpu
        watch_custom(sampler, self._no_branches)
        self.tree_sampler = TreeSampler(sampler, self.trees, self.stats)
        return sampler, self.tree_sampler

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Full graphs hold trees of one size; vLLM falls back from others, with a warning."""
        return AttentionCGSupport.UNIFORM_BATCH, "ReDrafter's tree attention"

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self._chains:
            # vLLM's own attention, and chains leave nothing to move.
            check_states(kv_cache_config.kv_cache_groups, cpu=self.device.type == "cpu")
            self.movers = [_stay] * len(kv_cache_config.kv_cache_groups)
            return
        layers = self.vllm_config.compilation_config.static_forward_context
        self.movers = [
            take_over({name: layers[name] for name in group.layer_names}, self.device)
            for group in kv_cache_config.kv_cache_groups
        ]

    # -- before the forward pass -----------------------------------------------------------

    def preprocess_state(
        self,
        input_batch: Any,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: Any,
        num_computed_tokens: Tensor,
    ) -> None:
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        self.logits_rows = np.diff(input_batch.cu_num_logits_np)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        metadata = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,
            for_capture=for_capture, ubatch_idx=ubatch_idx,
            model_specific_attn_metadata=model_specific_attn_metadata,
        )  # fmt: skip
        self._slot_mappings = slot_mappings
        if self._chains:
            return metadata
        step = self._tree_step(input_batch, cudagraph_mode == CUDAGraphMode.FULL, for_capture)
        if step is not None and self._thorough and not for_capture:
            check_tree_step(self.trees, input_batch, step)
        if step is not None:
            for layer_metadata in {id(m): m for m in metadata.values()}.values():
                setattr(layer_metadata, STEP_ATTRIBUTE, step)
        return metadata

    def _tree_step(self, input_batch: Any, replay: bool, for_capture: bool) -> TreeStep | None:
        """Which rows hold trees; written where a graph reads it if the step is one's."""
        scheduled = input_batch.num_scheduled_tokens
        rows, drafts = int(scheduled[0]), input_batch.num_draft_tokens_per_req
        uniform = bool((scheduled == rows).all())
        # A dummy batch has no drafts: it is captured, or keeps other ranks company.
        if not for_capture:
            if drafts is None:
                uniform = uniform and rows == 1
            else:
                uniform = uniform and bool((scheduled == 1 + drafts).all())
        if replay or for_capture:
            if not uniform:
                raise RuntimeError(
                    "vLLM chose a full CUDA graph for a step whose requests are no trees of one "
                    "size; set cudagraph_mode to PIECEWISE and report this."
                )
        elif not input_batch.num_draft_tokens:
            return None
        elif not uniform:
            return self.rows.mixed(input_batch)
        return self.rows.uniform(
            input_batch.idx_mapping, input_batch.seq_lens, rows, input_batch.num_reqs_after_padding
        )

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        positions = self._positions[: input_batch.num_tokens_after_padding]
        positions.copy_(input_batch.positions)
        # A dummy batch has them as int32.
        rows = input_batch.logits_indices.long()
        positions.index_copy_(0, rows, positions[rows] + self._depth_shift(input_batch))
        self.step = Step(positions, slot_mappings=self._slot_mappings)
        self.step.root_rows = rows[input_batch.cu_num_logits[:-1].long()]
        self._slot_mappings = None
        if self._thorough and input_batch.num_draft_tokens:
            check_trees(self.trees, input_batch, positions)
        if self.tree_sampler is not None:
            self.tree_sampler.step = self.step
        return {**inputs, "positions": positions}

    def _depth_shift(self, input_batch: Any) -> Tensor:
        """``[rows]`` int64: from a node's place in its tree to its depth."""
        slots, nodes = input_batch.expanded_idx_mapping, input_batch.expanded_local_pos.long()
        return self.trees.depths[slots, nodes] - nodes

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self._positions[:num_tokens].zero_()}

    # -- after the forward pass ------------------------------------------------------------

    def postprocess_state(
        self,
        idx_mapping: Tensor,
        num_sampled: Tensor,
        num_computed_tokens: Tensor | None = None,
    ) -> None:
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        step = self.step
        if step is None or step.walk is None or step.kv_moved:
            return
        assert step.slot_mappings is not None and step.root_rows is not None
        sources, targets, moved = kv_moves(step.walk.path, step.root_rows, step.slot_mappings)
        if self._thorough:
            slots = list(zip(sources, targets, strict=True))
            checked_move(self.movers, slots, lambda: self._move(sources, targets))
        else:
            self._move(sources, targets)
        self.stats.observe_moves(moved)

    def _move(self, sources: Tensor, targets: Tensor) -> None:
        for mover, source, target in zip(self.movers, sources, targets, strict=False):
            mover(source, target)


class HybridChainModelState(TreeModelState, MambaHybridModelState):
    """A target with recurrent layers, whose drafts are chains.

    vLLM's own class keeps a state per drafted token and goes on from the last accepted one's.
    """


def model_state_class(vllm_config: Any) -> type[TreeModelState]:
    """Which of the two a target needs."""
    model = vllm_config.model_config
    recurrent = model.is_hybrid or model.is_attention_free
    return HybridChainModelState if recurrent else TreeModelState
