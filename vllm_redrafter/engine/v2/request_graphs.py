# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a part of the step that only depends on how many requests there are.

vLLM's manager captures them in the pool of the target's graphs, with which they share memory:
what a graph makes inside is another graph's a moment later, so results go to buffers that were
there before. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager


class RequestGraphs(CudaGraphManager):
    """One graph per captured number of requests.

    Args:
        vllm_config: vLLM's.
        device: where.
        run: from buffers to buffers, for the first so many requests. It reads nothing back and
            waits for no other rank (``draft_graphs`` says why).
        title: of the progress bar at start-up.
    """

    def __init__(
        self, vllm_config: Any, device: torch.device, run: Callable[[int], None], title: str
    ) -> None:
        # A request is one row here.
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1)
        self.run = run
        self.title = title

    def capture_all(self) -> None:
        """Capture all sizes, after a warm-up each."""

        def create_forward_fn(desc: Any, warmup: bool) -> Callable[[Any], None]:
            return lambda mode: self.run(desc.num_reqs)

        self.capture(create_forward_fn, self.title)

    def find(self, requests: int) -> Any | None:
        """The smallest graph for so many requests, which ``run_fullgraph`` takes; None without."""
        desc = self.dispatch(requests, requests, uniform_token_count=1, num_active_loras=0)
        return desc if desc.cg_mode == CUDAGraphMode.FULL else None
