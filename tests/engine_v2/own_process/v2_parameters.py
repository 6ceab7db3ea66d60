# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_parameters.py`` on Model Runner V2."""

import numpy as np
import pytest
from engine_cases import lora, processors, reasoning
from engine_cases.cases import greedy
from engine_cases.leaning import LeanOnV2
from engine_cases.run import sampling_params
from engine_v1.tiny_target import prompts

from vllm_redrafter.engine.v2.tree_store import TreeStore


@pytest.fixture(scope="module")
def leaning(make_pair):
    return make_pair(logits_processors=[LeanOnV2])


def test_custom_processors(leaning):
    processors.check(leaning, processors.REASON_V2, count=4, tokens=8)


def test_control_trees_for_requests_with_a_custom_processor(leaning, monkeypatch):
    monkeypatch.setattr(TreeStore, "limit", lambda *_: None)
    params = sampling_params(greedy(**processors.ASKED) | {"max_tokens": 12})
    assert not leaning.run(prompts(4), params, chains=0, empty=0).equal


@pytest.mark.slow
def test_reasoning_before_structured_output(make_pair):
    reasoning.check(make_pair(**reasoning.settings()), count=4, tokens=18)


def test_lora(make_pair, tmp_path):
    pair = make_pair(**lora.SETTINGS)
    lora.check(pair, tmp_path, count=6, moves=1)
    # With an adapter for the root's row alone, vLLM's own answer, the head's adapter has no rows
    # for the nodes.
    state = pair.trees.runner.lora_state
    several = state._logits_rows
    assert int(several().max()) > 1
    state._logits_rows = lambda: np.ones_like(several())
    try:
        with pytest.raises(RuntimeError, match="size"):
            lora.run(pair, tmp_path, 4)
    finally:
        state._logits_rows = several
