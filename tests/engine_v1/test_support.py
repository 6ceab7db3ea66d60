# SPDX-License-Identifier: Apache-2.0
"""What the support table says of parameters is what Model Runner V1 does."""

import pytest
from engine_cases import processors, reasoning
from engine_cases.support_parameters import ask, note
from engine_cases.support_table import KINDS, PARAMETERS

from vllm_redrafter.engine.v1.runner import TreeRunnerMixin


@pytest.fixture
def seen(make_pair, monkeypatch):
    """A pair of engines, and what is verified for every prompt."""
    pair, most = make_pair(**reasoning.settings()), {}
    runner = pair.trees.runner

    def watched(req_id, scheduled):
        tree = TreeRunnerMixin._tree_to_verify(runner, req_id, scheduled)
        if tree:
            note(most, runner.requests[req_id].prompt_token_ids, tree.is_chain)
        return tree

    monkeypatch.setattr(runner, "_tree_to_verify", watched)
    return pair, most


def test_parameters(seen):
    assert ask(*seen, tokens=20) == {name: row.v1 for name, row in PARAMETERS.items()}


def test_requests_with_custom_processors():
    """The reasons that the engines' own tests expect to be counted."""
    row = KINDS["custom logits processors"]
    assert row.v1 in processors.REASON_V1 and row.v2 in processors.REASON_V2


def test_control_a_request_that_gets_less_than_the_table_says(seen, monkeypatch):
    pair, most = seen
    monkeypatch.setattr(
        pair.trees.runner, "_may_draft",
        lambda req_id: pair.trees.runner.requests[req_id].sampling_params.top_k != 5,
    )  # fmt: skip
    found = ask(pair, most, tokens=8)
    assert found["top_k"] != PARAMETERS["top_k"].v1
