# SPDX-License-Identifier: Apache-2.0
"""A worker that sends its counters; for both engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_redrafter.engine.first_rank import is_first_rank
from vllm_redrafter.engine.prometheus.receiver import wants_metrics
from vllm_redrafter.engine.prometheus.sender import Counted, MetricsSender


class MetricsWorkerMixin:
    """Mixed in before a worker class of vLLM's."""

    vllm_config: Any
    _metrics: MetricsSender | None = None

    def start_metrics(
        self,
        count: Callable[[], Counted],
        drafting_off: Callable[[], bool],
        urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send from now on, if there is a front end that listens; see ``MetricsSender``.

        vLLM passes on the outputs of the first tensor-parallel rank only.
        """
        if wants_metrics(self.vllm_config) and is_first_rank():
            self._metrics = MetricsSender(count, drafting_off, urgent)

    def execute_model(self, scheduler_output: Any) -> Any:
        sender = self._metrics
        if sender is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        sender.step_begins(idle=not scheduler_output.total_num_scheduled_tokens)
        return sender.carry(super().execute_model(scheduler_output))  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return output if self._metrics is None else self._metrics.carry(output)
