# SPDX-License-Identifier: Apache-2.0
"""A stat logger beside vLLM's own, which knows our messages."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.prometheus.receiver import Metrics
from vllm_redrafter.engine.prometheus.sender import KEY

logger = logging.getLogger("vllm.vllm_redrafter")


class ReDrafterStatLogger(AggregateStatLoggerBase):
    """Never raises: an error in a stat logger ends a server.

    Args:
        vllm_config: of engines with ReDrafter.
        engine_indexes: numbers of the data-parallel engines.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._metrics: Metrics | None = None
        try:
            name = vllm_config.model_config.served_model_name
            self._metrics = Metrics(name, engine_indexes, options_of(vllm_config))
        except Exception:
            self._give_up()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take our message out of a step's statistics, and count it."""
        if scheduler_stats is None or not scheduler_stats.ec_connector_stats:
            return
        message = scheduler_stats.ec_connector_stats.pop(KEY, None)
        # Empty it must be None: vLLM's loggers ask a connector what it means.
        scheduler_stats.ec_connector_stats = scheduler_stats.ec_connector_stats or None
        if not message or self._metrics is None:
            return
        try:
            self._metrics.add(message, engine_idx)
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        self._metrics = None
        logger.exception("ReDrafter's metrics stop here; requests are not affected.")

    def log_engine_initialized(self) -> None:
        """vLLM asks every logger."""
