# SPDX-License-Identifier: Apache-2.0
"""Targets of which no tree can be verified: the draft's best chain, by vLLM's own verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_cases.chains import write_chained
from engine_cases.targets import write_drafter
from vllm import SamplingParams

from engine_v1.conftest import SPEC
from engine_v1.engines import Pair, engine, tokens
from engine_v1.tiny_target import prompts
from vllm_redrafter.engine.v1.request_tree import RequestTree

LENGTH = 60
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    models: dict[str, Any] = {}

    def make(family: str, **settings: Any) -> Pair:
        if family not in models:
            directory = tmp_path_factory.mktemp("chains") / family
            models[family] = write_chained(directory, family)
            models["drafter"] = write_drafter(directory.with_name("drafter"))
        model, drafter = models[family], models["drafter"]
        settings = {"num_gpu_blocks_override": 256} | settings
        spec = SPEC | {key: settings.pop(key) for key in list(settings) if key[:5] == "spec_"}
        return Pair(engine(model, **settings), engine(model, drafter, **settings, **spec))

    return make


def check_family(pair: Pair) -> None:
    """Batch 1 and 4, greedy and seeded: accepted chains, and no tree."""
    for batch in (1, 4):
        for params in (GREEDY, SEEDED):
            run = pair.run(prompts(batch, shortest=20, longest=90), params, chain_first=True)
            run.assert_equal()
            stats = pair.trees.stats
            assert stats["acceptance_length"] > 2 and not stats["moves"], stats
            assert not stats["fallbacks"], stats
            varied = [len(set(said)) for said in tokens(run.expected)]
            assert params is GREEDY or min(varied) > LENGTH // 3, "nearly nothing is said"


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_family(pair_of, family):
    check_family(pair_of(family))


def test_a_measured_budget(pair_of):
    """As a user starts it: the drafter's own chains, as many nodes as pay."""
    pair = pair_of("deepseek_v3", spec_node_budget="auto", spec_num_speculative_tokens=6)
    batch = prompts(4, shortest=20, longest=90)
    expected = pair.plain.generate(batch, GREEDY)
    pair.trees.reset()
    assert tokens(pair.trees.generate(batch, GREEDY)) == tokens(expected)
    assert not pair.trees.stats["draft_errors"] and not pair.trees.stats["fallbacks"]


def test_control_trees(pair_of, monkeypatch):
    """What the chains are for: the same drafts, verified with their branches."""
    pair = pair_of("deepseek_v3")
    monkeypatch.setattr(RequestTree, "chain_length", property(len))
    assert not pair.run(prompts(4, shortest=20, longest=90), GREEDY).equal
