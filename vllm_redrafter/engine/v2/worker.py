# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with our speculator in place of the stock ones; chosen through ``worker_cls``."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu import model_runner

from vllm_redrafter.engine.v2.speculator import init_speculator


class TreeWorkerMixin:
    """Mixed in before a worker class of vLLM's."""

    model_runner: Any

    def init_device(self) -> None:
        # The runner binds this function by name and offers no other way in. It is put back at
        # once, so that other engines of the process keep vLLM's.
        stock = model_runner.init_speculator
        model_runner.init_speculator = init_speculator
        try:
            super().init_device()  # type: ignore[misc]
        finally:
            model_runner.init_speculator = stock

    def redrafter_stats(self) -> dict[str, Any]:
        """Counters since start; ``LLM.collective_rpc("redrafter_stats")`` calls this."""
        return self.model_runner.model_state.stats.summary()
