# SPDX-License-Identifier: Apache-2.0
"""`redrafter_*` from a worker's counters to Prometheus's, without engines."""

import logging
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorLogging
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_redrafter.engine.engine_args import OPTIONS_KEY
from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.prometheus import receiver, sender
from vllm_redrafter.engine.prometheus.catalog import COUNTERS, OFF, labels_of_all
from vllm_redrafter.engine.prometheus.logger import ReDrafterStatLogger
from vllm_redrafter.engine.prometheus.receiver import METRICS_KEY, Metrics
from vllm_redrafter.engine.prometheus.sender import EVERY, KEY, Changes, MetricsSender
from vllm_redrafter.engine.v2.stats import BAD_TREES, DeviceStats
from vllm_redrafter.options import ReDrafterOptions

OPTIONS = ReDrafterOptions(model="drafter", num_speculative_tokens=5)
NAME = re.compile(r"redrafter_[a-z]+(_[a-z]+)*")


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    yield
    receiver._unregister()


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("INFO", logger="vllm")
    return lambda: [record.message for record in caplog.records]


def count_something(stats, rng):
    stats.steps += 1
    for _ in range(rng.randint(1, 3)):
        nodes = rng.randint(1, 5)
        stats.observe(nodes, rng.randint(0, nodes))
    stats.nodes_by_source[rng.choice(["drafter", "lookup", "both"])] += 1
    stats.seconds["draft"] += rng.random()
    stats.fallbacks[rng.choice(["penalties (chain)", "a budget"])] += 1


def values(name):
    """Samples of one metric, by their labels' values."""
    found = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels.values())] = sample.value
    return found


# -- the catalog -----------------------------------------------------------------------------------


def test_names_follow_prometheus_conventions():
    names = [metric.name for metric in COUNTERS]
    assert len(set(names)) == len(names)
    for metric in COUNTERS:
        assert NAME.fullmatch(metric.name) and metric.name.endswith("_total")
        assert metric.documentation.endswith(".")
        if "seconds" in metric.name:
            assert "_seconds" in metric.name and "_ms" not in metric.name
    assert all(NAME.fullmatch(name) for name in labels_of_all())


def test_every_counter_of_the_worker_is_shown():
    """A counter that is added to the worker's is forgotten here, or this test is changed."""

    class Looked(ReDrafterStats):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    read = set()
    stats = Looked()
    fields = set(vars(stats))
    read.clear()
    for metric in COUNTERS:
        metric.read(stats)
    # The first rank, which alone is heard, has no tree that is not its own.
    assert fields - read == {"last_seconds", "watch", "replaced"}


# -- the worker's end ------------------------------------------------------------------------------


def test_messages_add_up():
    rng, stats, changes = random.Random(1), ReDrafterStats(), Changes()
    told = Counter()
    for _ in range(50):
        if rng.random() < 0.7:
            count_something(stats, rng)
        for name, by_label in changes.since_last(stats, False).items():
            assert all(added > 0 for added in by_label.values())
            told.update({(name, label): added for label, added in by_label.items()})
    wanted = {
        (metric.name, label): value
        for metric in COUNTERS
        for label, value in metric.read(stats).items()
        if value
    }
    assert told == pytest.approx(wanted) and len(wanted) > 12
    assert changes.since_last(stats, False) == {}


def test_counters_that_were_reset_are_told_anew():
    changes, stats = Changes(), ReDrafterStats(steps=7)
    assert changes.since_last(stats, False)["redrafter_steps_total"] == {"": 7}
    assert changes.since_last(ReDrafterStats(steps=2), False) == {"redrafter_steps_total": {"": 2}}


def test_drafting_off_is_told_once():
    changes, stats = Changes(), ReDrafterStats()
    assert changes.since_last(stats, False) == {}
    assert changes.since_last(stats, True) == {OFF: {"": 1.0}}
    assert changes.since_last(stats, True) == {}


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


class World:
    """A sender with a clock of its own, and the counters that it reads."""

    def __init__(self):
        self.stats, self.clock, self.urgent, self.counts = ReDrafterStats(), Clock(), False, 0
        self.sender = MetricsSender(self.count, lambda: False, lambda: self.urgent, self.clock)

    def count(self):
        self.counts += 1
        return lambda: self.stats

    def step(self, seconds=0.01, idle=False, output=None):
        """The message on a step's output, or None."""
        self.clock.seconds += seconds
        self.stats.steps += not idle
        self.sender.step_begins(idle)
        plain = ModelRunnerOutput([], {}) if output is None else output
        out = self.sender.carry(plain)
        return message_of(out)


def message_of(output):
    if output.ec_connector_output is None:
        return None
    return output.ec_connector_output.ec_connector_stats.data[KEY]


def test_a_message_a_second_and_none_between():
    world = World()
    sent = [world.step() for _ in range(500)]
    times = [number * 0.01 for number, message in enumerate(sent) if message]
    assert len(times) == 5
    assert all(later - time >= EVERY - 1e-6 for time, later in zip(times, times[1:], strict=False))
    # What counters are read and compared for.
    assert world.counts == 5


def test_an_idle_engine_tells_what_is_left():
    world = World()
    assert world.step()["redrafter_steps_total"] == {"": 1}
    assert world.step() is None
    assert world.step(idle=True) == {"redrafter_steps_total": {"": 1}}
    assert world.step(idle=True) is None  # nothing new
    assert EMPTY_MODEL_RUNNER_OUTPUT.ec_connector_output is None


def test_the_shared_empty_output_stays_empty():
    world = World()
    world.step()
    world.step()
    assert world.step(idle=True, output=EMPTY_MODEL_RUNNER_OUTPUT)
    assert EMPTY_MODEL_RUNNER_OUTPUT.ec_connector_output is None


def test_the_end_of_a_request_does_not_wait():
    world = World()
    world.step()
    assert world.step() is None
    world.urgent = True
    assert world.step() == {"redrafter_steps_total": {"": 2}}


def test_a_step_that_goes_on_keeps_its_message():
    """vLLM asks twice per step: ``execute_model`` says None, ``sample_tokens`` has the output."""
    world = World()
    world.stats.steps = 3
    world.sender.step_begins(idle=False)
    assert world.sender.carry(None) is None
    assert message_of(world.sender.carry(ModelRunnerOutput([], {})))


class Later(AsyncModelRunnerOutput):
    def __init__(self):
        self.output = ModelRunnerOutput([], {})

    def get_output(self):
        return self.output

    def get_kv_connector_output(self):
        return "what is left of it"


def test_an_output_that_is_still_computed():
    world = World()
    world.stats.steps = 3
    world.sender.step_begins(idle=False)
    output = Later()
    carrying = world.sender.carry(output)
    assert output.output.ec_connector_output is None
    assert carrying.get_kv_connector_output() == "what is left of it"
    assert message_of(carrying.get_output()) == {"redrafter_steps_total": {"": 3}}
    # Between messages it is vLLM's own object.
    world.sender.step_begins(idle=False)
    assert world.sender.carry(output) is output


@pytest.mark.parametrize("where", ["starting to count", "counting", "urgency"])
@pytest.mark.parametrize("later", [False, True])
def test_a_fault_costs_the_metrics_alone(said, where, later):
    def fail(*_):
        raise RuntimeError("no metrics today")

    world = World()
    if where == "starting to count":
        world.sender._count = fail
    elif where == "counting":
        world.sender._count = lambda: fail
    else:
        world.step()
        world.sender._urgent = fail
    for _ in range(3):
        world.sender.step_begins(idle=False)
        output = Later() if later else ModelRunnerOutput([], {})
        got = world.sender.carry(output)
        assert (got.get_output() if later else got).ec_connector_output is None
    assert sum("metrics stop here" in message for message in said()) == 1


# -- on the way ------------------------------------------------------------------------------------


def test_a_message_survives_the_way_to_another_process():
    stats = ReDrafterStats()
    count_something(stats, random.Random(2))
    message = Changes().since_last(stats, True)
    outputs = EngineCoreOutputs(scheduler_stats=SchedulerStats(ec_connector_stats={KEY: message}))
    frames = MsgpackEncoder().encode(outputs)
    arrived = MsgpackDecoder(EngineCoreOutputs).decode(frames)
    assert arrived.scheduler_stats.ec_connector_stats == {KEY: message}


# -- the front end's -------------------------------------------------------------------------------


def config(**additional):
    return SimpleNamespace(
        additional_config={OPTIONS_KEY: OPTIONS.to_dict(), METRICS_KEY: True, **additional},
        model_config=SimpleNamespace(served_model_name="target"),
    )


def test_messages_become_counters():
    metrics = Metrics("target", [0, 1], OPTIONS)
    assert values("redrafter_drafts_total") == {("target", "0"): 0, ("target", "1"): 0}
    depths = values("redrafter_accepted_tokens_by_depth_total")
    assert depths == {("target", e, str(d)): 0 for e in "01" for d in range(1, 6)}
    for _ in range(2):
        metrics.add({"redrafter_drafts_total": {"": 3.0}}, 1)
        metrics.add({"redrafter_fallbacks_total": {"penalties (chain)": 2.0}}, 0)
    assert values("redrafter_drafts_total") == {("target", "0"): 0, ("target", "1"): 6}
    assert values("redrafter_fallbacks_total") == {("target", "0", "penalties (chain)"): 4}
    metrics.add({OFF: {"": 1.0}}, 1)
    assert values(OFF) == {("target", "0"): 0, ("target", "1"): 1}
    (info,) = {labels[2:] for labels in values("redrafter_config_info")}
    assert info == ("drafter", "4", "3", "5", "best", "True", "auto")


def test_exactly_the_catalog_is_registered():
    metrics = Metrics("target", [0], OPTIONS)
    for metric in COUNTERS:
        metrics.add({metric.name: {"1" if metric.label else "": 1.0}}, 0)
    seen = {
        sample.name: tuple(sample.labels)
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("redrafter_") and not sample.name.endswith("_created")
    }
    assert seen == labels_of_all()


def test_another_engine_in_the_same_process_counts_from_nothing():
    Metrics("target", [0], OPTIONS).add({"redrafter_drafts_total": {"": 3.0}}, 0)
    metrics = Metrics("other", [0], OPTIONS)
    assert values("redrafter_drafts_total") == {("other", "0"): 0}
    metrics.add({"of_another_version_total": {"": 1.0}}, 0)


def test_vllms_own_loggers_never_see_a_message():
    logger = ReDrafterStatLogger(config(), [0])
    stats = SchedulerStats(ec_connector_stats={KEY: {"redrafter_drafts_total": {"": 2.0}}})
    logger.record(stats, None)
    assert stats.ec_connector_stats is None
    assert values("redrafter_drafts_total") == {("target", "0"): 2}
    # The other way round: it would end the server.
    with pytest.raises(AttributeError):
        ECConnectorLogging(None).observe({KEY: {}})


def test_what_is_not_ours_stays():
    logger = ReDrafterStatLogger(config(), [0])
    stats = SchedulerStats(ec_connector_stats={"saves": 1, KEY: {}})
    logger.record(stats, None)
    assert stats.ec_connector_stats == {"saves": 1}
    logger.record(None, None)
    logger.record(SchedulerStats(), None)


@pytest.mark.parametrize("bad", [{"redrafter_drafts_total": {"": -1.0}}, {OFF: {}}, "nonsense"])
def test_a_bad_message_is_taken_away_all_the_same(said, bad):
    logger = ReDrafterStatLogger(config(), [0])
    for _ in range(2):
        stats = SchedulerStats(ec_connector_stats={KEY: bad})
        logger.record(stats, None)
        assert stats.ec_connector_stats is None
    assert sum("metrics stop here" in message for message in said()) == 1


def test_metrics_that_cannot_be_registered_are_no_error(said, monkeypatch):
    monkeypatch.setattr(receiver, "COUNTERS", (None,))
    logger = ReDrafterStatLogger(config(), [0])
    stats = SchedulerStats(ec_connector_stats={KEY: {"redrafter_drafts_total": {"": 2.0}}})
    logger.record(stats, None)
    assert stats.ec_connector_stats is None
    assert sum("metrics stop here" in message for message in said()) == 1


@pytest.fixture
def manager(monkeypatch):
    """A class in the place of vLLM's ``StatLoggerManager``."""

    class Manager:
        def __init__(self, vllm_config, engine_idxs=None):
            self.engine_indexes, self.stat_loggers = engine_idxs or [0], ["vLLM's"]

    monkeypatch.setattr("vllm.v1.metrics.loggers.StatLoggerManager", Manager)
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", False)
    assert receiver.listen() and receiver.listen()
    return Manager


def test_our_logger_is_the_first(manager):
    loggers = manager(vllm_config=config(), engine_idxs=[0, 1]).stat_loggers
    assert isinstance(loggers[0], ReDrafterStatLogger) and loggers[1:] == ["vLLM's"]
    assert len(values("redrafter_drafts_total")) == 2


@pytest.mark.parametrize("additional", [None, {}, {"redrafter": {}}, {METRICS_KEY: False}])
def test_other_engines_are_left_alone(manager, additional):
    other = SimpleNamespace(additional_config=additional)
    assert manager(other).stat_loggers == ["vLLM's"]


def test_nobody_sends_where_nobody_listens(monkeypatch, said):
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True)
    assert not receiver.listen()
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", False)
    monkeypatch.delattr("vllm.v1.metrics.loggers.StatLoggerManager")
    assert not receiver.listen()
    assert any("no redrafter_* metrics" in message for message in said())
    assert sender.KEY == KEY


# -- counters on a device --------------------------------------------------------------------------


def test_a_copy_of_the_devices_counters_is_of_that_moment():
    stats = DeviceStats(4, torch.device("cpu"))
    drafted, accepted = torch.tensor([True, True]), torch.tensor([2, 0])
    stats.observe(drafted, torch.tensor([5, 3]), accepted)
    stats.host.fall_back("penalties (chain)")
    stats.observe_bad_trees(torch.tensor([True, False]))
    before, copied = stats.summary(), stats.copied()
    stats.observe(drafted, torch.tensor([5, 3]), accepted)
    stats.host.fall_back("penalties (chain)")
    stats.host.fall_back("bad words (chain)")
    assert copied().summary() == before != stats.summary()
    assert before["draft_errors"] == {BAD_TREES: 1} and before["drafts"] == 2
