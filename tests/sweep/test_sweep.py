# SPDX-License-Identifier: Apache-2.0
"""A short sweep with a fixed seed; that a fault is found; and that cases are made small."""

from __future__ import annotations

import json
import random

import pytest
from engine_v1.tiny_target import tiny_drafter, write_target

from sweep.run import Sweep
from sweep.shrink import shrink
from sweep.space import DEFAULTS, random_case, random_settings
from vllm_redrafter.drafter.checkpoint import save_drafter


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    from vllm_redrafter.plugin import register

    register()
    root = tmp_path_factory.mktemp("sweep")
    save_drafter(tiny_drafter(), root / "drafter")
    return Sweep(write_target(root / "target"), root / "drafter")


@pytest.mark.slow
def test_a_short_sweep(sweep):
    """300 requests on 6 engines."""
    source = random.Random(20)
    for _ in range(6):
        settings = random_settings(source)
        for _ in range(2):
            sweep.run(random_case(source, settings, 25))
    totals = sweep.totals
    assert totals.requests >= 270 and totals.moves > 100 and totals.preemptions > 0, totals
    assert not totals.faults, [finding.what for _, finding in totals.faults]
    assert totals.ties <= 2, totals


@pytest.mark.slow
def test_a_fault_is_found_and_made_small(sweep, monkeypatch):
    """KV rows of accepted branches that stay where they are make later tokens wrong."""
    case = random_case(random.Random(3), DEFAULTS, 12)
    case["oracle"] = {"seed": 1, "chain_first": False, "chains": 0.0, "empty": 0.0}
    which = sweep.trees(case["settings"])
    lost = [lambda sources, destinations: None for _ in which.runner._movers]
    monkeypatch.setattr(which.runner, "_movers", lost)
    assert sweep.fails(case)
    small = shrink(case, sweep.fails, most=8)
    assert sweep.fails(json.loads(json.dumps(small)))
    assert len(small["requests"]) < 6
    monkeypatch.undo()
    assert not sweep.fails(case)


def test_a_case_is_made_small():
    """Without an engine: what fails is one request's penalty on engines with blocks of 64."""
    source = random.Random(5)
    settings = {**random_settings(source), "block_size": 64}
    case = random_case(source, settings, 20)
    case["requests"][13]["params"]["presence_penalty"] = 0.5

    def fails(case):
        return case["settings"]["block_size"] == 64 and any(
            request["params"].get("presence_penalty") == 0.5 for request in case["requests"]
        )

    small = shrink(case, fails, most=1000)
    assert fails(small)
    [request] = small["requests"]
    assert request["params"].keys() == {"temperature", "max_tokens", "presence_penalty"}
    assert request["params"]["max_tokens"] == 1 and len(request["prompt"]) == 1
    assert small["settings"] == DEFAULTS | {"block_size": 64}


def test_cases_are_plain_values():
    """So that one that failed can be written, sent and run again."""
    source = random.Random(1)
    for _ in range(200):
        case = random_case(source, random_settings(source), 5)
        assert json.loads(json.dumps(case)) == case
