# SPDX-License-Identifier: Apache-2.0
"""The hooks of Model Runner V2 around the target's forward pass.

In the runner's order: ``add_request``; then each step ``prepare_attn`` (which rows hold trees),
``prepare_inputs`` (positions by depth), the forward pass, ``TreeSampler``, and
``postprocess_state`` (the accepted path's KV moves behind its root). None reads the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.tree_step import STEP_ATTRIBUTE, TreeStep
from vllm_redrafter.engine.v2.attention import take_over
from vllm_redrafter.engine.v2.fallback import shape_of_request
from vllm_redrafter.engine.v2.sampler import Step, TreeSampler
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.tree_store import TreeStore
from vllm_redrafter.ops.move_kv import MoveKV


class TreeModelState(DefaultModelState):
    """A decoder-only target whose drafts are trees."""

    supports_prompt_embeds = True

    def __init__(
        self, vllm_config: Any, model: torch.nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        nodes = options_of(vllm_config).num_speculative_tokens
        self.trees = TreeStore(self.max_num_reqs, nodes, device)
        self.stats = DeviceStats(nodes, device)
        self.step: Step | None = None
        self.movers: list[MoveKV] = []
        self.tree_sampler: TreeSampler | None = None
        # Of fixed address, so that a CUDA graph can read them.
        self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self._masks = torch.zeros(
            self.max_num_tokens, self.trees.masks.shape[2], dtype=torch.int64, device=device
        )
        self._slot_mappings: Tensor | None = None

    # -- requests --------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        shape, reason = shape_of_request(new_req_data, self.model_config)
        if reason:
            self.stats.host.fall_back(reason)
        self.trees.reset(req_index, shape)

    # -- start-up --------------------------------------------------------------------------

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        for name in ("return_sampling_mask", "enable_trace_replay"):
            if getattr(self.model_config, name, False):
                raise UnsupportedError(f"ReDrafter does not support {name}; leave it off.")
        self.tree_sampler = TreeSampler(sampler, self.trees, self.stats)
        return sampler, self.tree_sampler

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        layers = self.vllm_config.compilation_config.static_forward_context
        self.movers = [
            take_over({name: layers[name] for name in group.layer_names}, self.device)
            for group in kv_cache_config.kv_cache_groups
        ]

    # -- before the forward pass -----------------------------------------------------------

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        metadata = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, *args, **kwargs
        )
        self._slot_mappings = slot_mappings
        if input_batch.num_draft_tokens:
            step = self._tree_step(input_batch)
            for layer_metadata in {id(m): m for m in metadata.values()}.values():
                setattr(layer_metadata, STEP_ATTRIBUTE, step)
        return metadata

    def _tree_step(self, input_batch: Any) -> TreeStep:
        """Requests whose rows are a root and its nodes; the others are vLLM's to compute.

        A request that is still prefilling may carry placeholder nodes behind several prompt
        tokens: those are rejected anyway, so its rows are computed as a chain.
        """
        starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
        rows = starts[1:] - starts[:-1]
        logits = input_batch.cu_num_logits[1:] - input_batch.cu_num_logits[:-1]
        count = torch.where(rows == logits, rows, 0)
        # The host knows the same from the schedule.
        scheduled = input_batch.num_scheduled_tokens
        covers_all = bool((scheduled == 1 + input_batch.num_draft_tokens_per_req).all())
        return TreeStep(
            request_index=torch.arange(
                input_batch.num_reqs, dtype=torch.int32, device=starts.device
            ),
            row_start=starts[:-1],
            row_count=count,
            context_lens=input_batch.seq_lens[: input_batch.num_reqs] - rows,
            masks=self._row_masks(input_batch),
            covers_all=covers_all,
        )

    def _row_masks(self, input_batch: Any) -> Tensor:
        """``[T, words]`` int64: which rows of its request every node sees."""
        masks = self._masks[: input_batch.num_tokens_after_padding]
        slots, nodes = input_batch.expanded_idx_mapping, input_batch.expanded_local_pos.long()
        masks.zero_()
        return masks.index_copy_(0, input_batch.logits_indices, self.trees.masks[slots, nodes])

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
        if self.tree_sampler is not None:
            self.tree_sampler.step = self.step
        return {**inputs, "positions": positions}

    def _depth_shift(self, input_batch: Any) -> Tensor:
        """``[rows]`` int64: from a node's place in its tree to its depth."""
        slots, nodes = input_batch.expanded_idx_mapping, input_batch.expanded_local_pos.long()
        return self.trees.depths[slots, nodes] - nodes

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self._positions[:num_tokens]}

    # -- after the forward pass ------------------------------------------------------------

    def postprocess_state(
        self,
        idx_mapping: Tensor,
        num_sampled: Tensor,
        num_computed_tokens: Tensor | None = None,
    ) -> None:
        step = self.step
        if step is None or step.walk is None:
            return
        assert step.slot_mappings is not None and step.root_rows is not None
        path = step.walk.path
        depth = torch.arange(1, path.shape[1] + 1, device=path.device)
        moved = (path > 0) & (path != depth)
        root = step.root_rows[:, None]
        last = step.slot_mappings.shape[1] - 1
        source = (root + path).clamp_(min=0, max=last).flatten()
        target = (root + depth).clamp_(max=last).flatten()
        for group, mover in enumerate(self.movers):
            slots = step.slot_mappings[group].long()
            keep = moved.flatten()
            mover(torch.where(keep, slots[source], -1), torch.where(keep, slots[target], -1))
        self.stats.observe_moves(moved)
