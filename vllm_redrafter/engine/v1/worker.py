# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with our runner in place of the stock one."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_redrafter.engine.v1.runner import TreeRunnerMixin


class ReDrafterCPUModelRunner(TreeRunnerMixin, CPUModelRunner):
    """Model Runner V1 on the CPU, verifying trees."""


class ReDrafterCPUWorker(cpu_worker.CPUWorker):
    """Chosen through ``worker_cls`` by ``vllm_redrafter.engine.engine_args``."""

    def init_device(self) -> None:
        # The stock method names its runner as a module global and offers no other way in.
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = ReDrafterCPUModelRunner  # type: ignore[misc]
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock  # type: ignore[misc]

    def redrafter_stats(self) -> dict[str, Any]:
        """Counters since start; ``LLM.collective_rpc("redrafter_stats")`` calls this.

        ``remembered_trees`` and ``remembered_requests`` are what the worker holds at this moment:
        0 when no request is left.
        """
        runner = self.model_runner
        return {
            **runner.redrafter_stats.summary(),
            "remembered_trees": len(runner._trees),
            "remembered_requests": len(runner.requests),
        }
