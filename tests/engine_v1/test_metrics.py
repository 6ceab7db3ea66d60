# SPDX-License-Identifier: Apache-2.0
"""`redrafter_*` in an engine that runs in this process, right after an answer."""

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams

from engine_v1.conftest import SPEC
from engine_v1.engines import answers, engine
from engine_v1.tiny_target import prompts
from vllm_redrafter.engine.prometheus.catalog import COUNTERS

PARAMS = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture(scope="module")
def counting(target, drafter):
    # An LLM counts nothing unless it is asked to.
    return engine(target, drafter, disable_log_stats=False, **SPEC)


@pytest.fixture
def sender(counting):
    counting.reset()
    worker = counting.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker._metrics


def counted():
    """Our samples, by name and the label that a counter has beside the engine's."""
    labels = {metric.name: metric.label for metric in COUNTERS}
    return {
        (sample.name, sample.labels.get(labels[sample.name], "")): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name in labels
    }


def new_since(before):
    return {
        key: value - before.get(key, 0.0)
        for key, value in counted().items()
        if value != before.get(key, 0.0)
    }


def test_nothing_is_missing_when_the_answers_are_there(counting, sender):
    before = counted()
    counting.generate(prompts(6), PARAMS)
    stats, new = counting.runner.redrafter_stats, new_since(before)
    told = {
        (metric.name, label): value
        for metric in COUNTERS
        for label, value in metric.read(stats).items()
        if value
    }
    # The clock of the step that ended them runs until the next one begins.
    of_clock = {key for key in told if "step" in key[0]}
    assert {k: v for k, v in new.items() if k not in of_clock} == pytest.approx(
        {k: v for k, v in told.items() if k not in of_clock}
    )
    assert told["redrafter_drafts_total", ""] > 20


def test_a_fault_changes_no_answer(counting, sender, monkeypatch):
    expected = counting.generate(prompts(4), PARAMS)

    def fail():
        raise RuntimeError("no metrics today")

    before = counted()
    monkeypatch.setattr(sender, "_count", fail)
    assert answers(counting.generate(prompts(4), PARAMS)) == answers(expected)
    assert sender._broken and not new_since(before)
    sender._broken = False


def test_vllms_own_loggers_never_see_a_message(counting, sender):
    """And the control: without our logger in front of it, vLLM's raises."""
    from vllm.v1.metrics.loggers import LoggingStatLogger

    llm = counting.llm.llm_engine
    loggers = llm.logger_manager.stat_loggers
    # vLLM leaves it out where the log level is above INFO, as in these tests.
    loggers.append(LoggingStatLogger(llm.vllm_config))
    before = counted()
    counting.generate(prompts(2), PARAMS)
    assert new_since(before)
    ours = loggers.pop(0)
    assert type(ours).__name__ == "ReDrafterStatLogger"
    with pytest.raises(AttributeError, match="connector_cls"):
        counting.generate(prompts(2), PARAMS)
    loggers[:] = [ours, *loggers[:-1]]
    while llm.has_unfinished_requests():
        llm.step()
