# SPDX-License-Identifier: Apache-2.0
"""Custom logits processors, one for each model runner, for the requests that ask for them.

Both look at more than a row: on V1 at how often they were called, on V2 at the row before.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

TOKENS = 257


def strength(params: Any) -> float:
    return (params.extra_args or {}).get("lean", 0.0)


class Calls:
    """Leans on another token at each call."""

    def __init__(self, lean: float) -> None:
        self.lean, self.calls = lean, 0

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits[self.calls * 37 % len(logits)] += self.lean
        return logits


class LeanOnV1(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Calls | None:
        return Calls(strength(params)) if strength(params) else None


class LeanOnV2(LogitsProcessor):
    """Leans on a token that follows from the last but one, as the interface says where that is."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.states = req_states
        self.lean = torch.zeros(req_states.max_num_reqs)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.lean[req_idx] = strength(sampling_params)
        return bool(strength(sampling_params))

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots, place = ctx.expanded_idx_mapping.long(), ctx.expanded_local_pos.long()
        before = self.states.total_len.gpu[slots].long() - 2
        committed = self.states.all_token_ids.gpu[slots, before.clamp(min=0)].long()
        drafted = ctx.input_ids.long().roll(1)
        rows = torch.arange(len(slots))
        logits[rows, torch.where(place > 0, drafted, committed) * 37 % TOKENS] += self.lean[slots]
        return logits
