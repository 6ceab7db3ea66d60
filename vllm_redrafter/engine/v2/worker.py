# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with our speculator in place of the stock ones; chosen through ``worker_cls``."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu import model_runner

from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.prometheus.worker import MetricsWorkerMixin
from vllm_redrafter.engine.start_up_line import say_what_runs
from vllm_redrafter.engine.v2.lora import TreeLoraState
from vllm_redrafter.engine.v2.speculator import init_speculator


class TreeWorkerMixin(MetricsWorkerMixin):
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
        runner = self.model_runner
        if runner.lora_config is not None:
            runner.lora_state = TreeLoraState(
                runner.max_num_reqs, lambda: runner.model_state.logits_rows
            )

    def compile_or_warm_up_model(self) -> Any:
        done = super().compile_or_warm_up_model()  # type: ignore[misc]
        # On a GPU vLLM has served requests of its own by now, in every way that there is.
        stats, guard = (
            self.model_runner.model_state.stats,
            self.model_runner.speculator.draft_guard,
        )
        stats.reset()
        guard.serving = True
        self.start_metrics(count=stats.copied, drafting_off=lambda: guard.off)
        say_what_runs(self.vllm_config, "V2", self.model_runner.device)
        return done

    def sleep(self, level: int = 1) -> None:
        if level > 1:
            # The drafter's weights and our constants are in the memory that vLLM then gives up,
            # and it brings back the target's alone.
            raise UnsupportedError("ReDrafter does not support sleep level 2; use level 1.")
        super().sleep(level)  # type: ignore[misc]

    def redrafter_stats(self) -> dict[str, Any]:
        """Counters since start; ``LLM.collective_rpc("redrafter_stats")`` calls this."""
        return {
            **self.model_runner.model_state.stats.summary(),
            "drafting_off": self.model_runner.speculator.draft_guard.off,
        }
