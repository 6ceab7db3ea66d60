# SPDX-License-Identifier: Apache-2.0
"""The front end's end: messages of the workers become Prometheus counters.

vLLM's ``/metrics`` shows whatever is in the process's default registry, or, with several API
servers, in its folder of shared files, which prometheus_client's counters find by themselves.
"""

from __future__ import annotations

import functools
import logging
from contextlib import suppress
from typing import Any

from vllm_redrafter.engine.prometheus.catalog import (
    COUNTERS,
    INFO,
    INFO_DOCUMENTATION,
    INFO_LABELS,
    LABELS,
    OFF,
    OFF_DOCUMENTATION,
)

logger = logging.getLogger("vllm.vllm_redrafter")

# In vLLM's additional_config: a front end listens, so workers may send.
METRICS_KEY = "redrafter_metrics"

_WRAPPED_MARK = "_vllm_redrafter_wrapped"

# Of the engine that started last in this process, as with vLLM's own metrics.
_registered: list[Any] = []


def wants_metrics(vllm_config: Any) -> bool:
    """Whether ``listen`` succeeded where this configuration was made."""
    return bool((vllm_config.additional_config or {}).get(METRICS_KEY))


def listen() -> bool:
    """Listen in the engines that this process starts from now on.

    Returns:
        whether workers may send: what nobody takes away, vLLM's own loggers would stumble over.
    """
    try:
        from vllm import envs

        if envs.VLLM_USE_RUST_FRONTEND:
            logger.info("vLLM's front end in Rust shows no redrafter_* metrics.")
            return False
        _wrap()
    except Exception:
        logger.exception("There are no redrafter_* metrics; requests are not affected.")
        return False
    return True


def _wrap() -> None:
    from vllm.v1.metrics.loggers import StatLoggerManager

    # Now: what cannot be imported must not come up when an engine starts.
    from vllm_redrafter.engine.prometheus.logger import ReDrafterStatLogger

    original = StatLoggerManager.__init__
    if getattr(original, _WRAPPED_MARK, False):
        return

    @functools.wraps(original)
    def with_ours(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if wants_metrics(vllm_config):
            # Before vLLM's own: it takes away what they do not know.
            self.stat_loggers.insert(0, ReDrafterStatLogger(vllm_config, self.engine_indexes))

    setattr(with_ours, _WRAPPED_MARK, True)
    StatLoggerManager.__init__ = with_ours  # type: ignore[method-assign]


class Metrics:
    """The metrics of a process's engines, registered anew.

    Args:
        model_name: value of the label.
        engines: numbers of the data-parallel engines.
        options: ``ReDrafterOptions``.
    """

    def __init__(self, model_name: str, engines: list[int], options: Any) -> None:
        from prometheus_client import Counter, Gauge

        _unregister()
        self._model_name = model_name
        self._counters: dict[str, Any] = {}
        for metric in COUNTERS:
            labels = LABELS + ((metric.label,) if metric.label else ())
            counter = Counter(metric.name, metric.documentation, labels)
            self._counters[metric.name] = counter
            _registered.append(counter)
            for engine in engines:
                for value in metric.known(options) if metric.label else ("",):
                    self._child(metric.name, engine, value)
        self._off = Gauge(OFF, OFF_DOCUMENTATION, LABELS, multiprocess_mode="mostrecent")
        info_labels = (*LABELS, *INFO_LABELS)
        info = Gauge(INFO, INFO_DOCUMENTATION, info_labels, multiprocess_mode="mostrecent")
        _registered.extend((self._off, info))
        values = [str(getattr(options, attribute)) for attribute in INFO_LABELS.values()]
        for engine in engines:
            self._off.labels(model_name, str(engine)).set(0)
            info.labels(model_name, str(engine), *values).set(1)

    def add(self, message: dict[str, dict[str, float]], engine: int) -> None:
        """Count what an engine's worker says; names of another version are left out."""
        for name, values in message.items():
            if name == OFF:
                self._off.labels(self._model_name, str(engine)).set(values[""])
            elif name in self._counters:
                for label, added in values.items():
                    self._child(name, engine, label).inc(added)

    def _child(self, name: str, engine: int, label: str) -> Any:
        more = (label,) if label else ()
        return self._counters[name].labels(self._model_name, str(engine), *more)


def _unregister() -> None:
    from prometheus_client import REGISTRY

    while _registered:
        with suppress(KeyError):  # somebody else did
            REGISTRY.unregister(_registered.pop())
