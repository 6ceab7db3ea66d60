# SPDX-License-Identifier: Apache-2.0
"""LoRA beside trees on Model Runner V2: an adapter per row of logits, not per request.

vLLM tells the adapters of an output head (they run with every adapter, zeros where it has none) of
one row of logits per request; a request with a tree has a row per node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.lora_utils import LoraState


class TreeLoraState(LoraState):
    """Stands in for a runner's ``lora_state``.

    Args:
        max_num_reqs: request slots.
        logits_rows: ``[B]`` integers, rows of logits of every request of the step, in batch order.
    """

    def __init__(self, max_num_reqs: int, logits_rows: Callable[[], np.ndarray]) -> None:
        super().__init__(max_num_reqs)
        self._logits_rows = logits_rows

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[Any]]:
        of_requests, of_tokens, active = super().make_lora_inputs(
            req_ids, idx_mapping, num_scheduled_tokens
        )
        of_logits = np.repeat(np.array(of_requests), self._logits_rows())
        return tuple(of_logits), of_tokens, active
