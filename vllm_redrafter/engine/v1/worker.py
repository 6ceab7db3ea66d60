# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with our runner in place of the stock one."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_redrafter.engine.prometheus.worker import MetricsWorkerMixin
from vllm_redrafter.engine.start_up_line import say_what_runs
from vllm_redrafter.engine.v1.runner import TreeRunnerMixin


class ReDrafterCPUModelRunner(TreeRunnerMixin, CPUModelRunner):
    """Model Runner V1 on the CPU, verifying trees."""


class ReDrafterCPUWorker(MetricsWorkerMixin, cpu_worker.CPUWorker):
    """Chosen through ``worker_cls`` by ``vllm_redrafter.engine.engine_args``."""

    def init_device(self) -> None:
        # The stock method names its runner as a module global and offers no other way in.
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = ReDrafterCPUModelRunner  # type: ignore[misc]
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        runner = self.model_runner
        runner.measure_costs()
        runner.draft_guard.serving = True
        self.start_metrics(
            count=lambda: lambda: runner.redrafter_stats,
            drafting_off=lambda: runner.draft_guard.off,
            urgent=lambda: runner.someone_ended,
        )
        say_what_runs(self.vllm_config, "V1", runner.device)
        return times

    def redrafter_measure(self) -> dict[str, Any]:
        """A cost table measured now, as plain values; `vllm-redrafter calibrate` calls this."""
        return self.model_runner.measured_costs().to_json()

    def redrafter_stats(self) -> dict[str, Any]:
        """Counters since start; ``LLM.collective_rpc("redrafter_stats")`` calls this.

        ``drafting_off``: after too many errors in a row. ``remembered_trees`` and
        ``remembered_requests`` are what the worker holds at this moment: 0 when no request is left.
        """
        runner = self.model_runner
        return {
            **runner.redrafter_stats.summary(),
            "drafting_off": runner.draft_guard.off,
            "remembered_trees": len(runner._trees),
            "remembered_requests": len(runner.requests),
        }
