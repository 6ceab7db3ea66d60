# SPDX-License-Identifier: Apache-2.0
"""One line in the log when hardly anything of the drafter's is accepted."""

import logging

import pytest
import torch

from vllm_redrafter.engine.acceptance_watch import HARDLY_ANY, WINDOW, AcceptanceWatch
from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.v1.drafting import Drafting
from vllm_redrafter.engine.v1.request_tree import chain
from vllm_redrafter.engine.v2.stats import LOOK_EVERY, DeviceStats
from vllm_redrafter.options import ReDrafterOptions


@pytest.fixture
def said(caplog, monkeypatch):
    """Messages so far, each once."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("WARNING", logger="vllm")
    return lambda: [r.message for r in caplog.records if "acceptance length" in r.message]


def test_it_says_so_once(said):
    watch = AcceptanceWatch()
    for _ in range(WINDOW - 1):
        watch.note(1, 0)
    assert not said()
    watch.note(1, 1)
    (message,) = said()
    assert "stays near 1.0: 1.001 tokens per step in the last 1000 drafts" in message
    assert "trained for this target" in message and "chat template" in message
    for _ in range(3 * WINDOW):
        watch.note(1, 0)
    assert len(said()) == 1


@pytest.mark.parametrize("per_draft", [HARDLY_ANY, 0.4, 3.0])
def test_a_drafter_that_is_right_now_and_then_passes(said, per_draft):
    watch = AcceptanceWatch()
    for i in range(5 * WINDOW):
        watch.note(1, int((i + 1) * per_draft) - int(i * per_draft))
    assert not said()


def test_later_too(said):
    watch = AcceptanceWatch()
    watch.note(WINDOW, WINDOW)
    watch.note(WINDOW, 0)
    assert len(said()) == 1


def test_every_counter_has_its_own():
    assert ReDrafterStats().watch is not ReDrafterStats().watch


@pytest.mark.parametrize("by_source, silent", [([0, 3, 900, 0], False), ([0, 3, 900, 200], True)])
def test_on_the_device_the_drafters_nodes_count(said, by_source, silent):
    """What the lookup alone found is no merit of the drafter."""
    stats = DeviceStats(4, torch.device("cpu"))
    for step in range(8 * LOOK_EVERY):
        if step % LOOK_EVERY == 0:
            stats.accepted += torch.tensor([100, 100, 0, 0, 0])
            stats.accepted_by_source += torch.tensor(by_source)
        stats.observe_step()
    assert bool(said()) is not silent


def test_what_was_counted_before_a_reset_is_forgotten(said):
    stats = DeviceStats(4, torch.device("cpu"))
    stats.accepted += torch.tensor([10 * WINDOW, 0, 0, 0, 0])
    stats.reset()
    for _ in range(4 * LOOK_EVERY):
        stats.observe_step()
    assert not said()


@pytest.mark.parametrize("token, silent", [(-1, True), (7, False)])
def test_padding_of_vllms_scheduler_is_no_draft(said, token, silent):
    stats = ReDrafterStats()
    options = ReDrafterOptions(model="m", num_speculative_tokens=3)
    drafting = Drafting(options, lambda *_: None, lambda: stats)
    for _ in range(WINDOW):
        drafting.observe("request", chain([token] * 3), [], 0.0)
    assert bool(said()) is not silent
