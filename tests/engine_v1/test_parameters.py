# SPDX-License-Identifier: Apache-2.0
"""What vLLM refuses beside other drafts, or gives to single requests: exact on Model Runner V1.

``min_p`` and ``logit_bias`` are cases of ``engine_cases``; here are their controls.
"""

import pytest
from engine_cases import lora, processors, reasoning
from engine_cases.cases import greedy, seeded
from engine_cases.leaning import LeanOnV1
from engine_cases.run import sampling_params
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinPLogitsProcessor

from engine_v1.tiny_target import prompts
from vllm_redrafter.engine import inherited_checks
from vllm_redrafter.engine.v1 import runner as runner_module


@pytest.fixture(scope="module")
def leaning(make_pair):
    return make_pair(logits_processors=[LeanOnV1])


def test_custom_processors(leaning):
    processors.check(leaning, processors.REASON_V1)


def test_control_drafts_for_requests_with_a_custom_processor(leaning, monkeypatch):
    monkeypatch.setattr(runner_module, "custom_may_change", lambda *_: False)
    assert not processors.run(leaning, 12, 24).equal


def test_reasoning_before_structured_output(make_pair):
    reasoning.check(make_pair(**reasoning.settings()))


def test_lora(make_pair, tmp_path):
    lora.check(make_pair(**lora.SETTINGS), tmp_path)


BIASED = [greedy(logit_bias={token: 5.0 for token in range(20, 60)})] * 4
MIN_P = [seeded(i, min_p=0.3, max_tokens=30) for i in range(4)]


@pytest.mark.parametrize(
    "params, without",
    [(BIASED, LogitBiasLogitsProcessor), (MIN_P, MinPLogitsProcessor)],
    ids=["logit_bias", "min_p"],
)
def test_control_a_processor_left_out(pair, monkeypatch, params, without):
    """As vLLM itself leaves them out beside drafts."""
    params = [sampling_params(row) for row in params]
    pair.run(prompts(4), params).assert_equal()
    having = pair.trees.runner.input_batch.logitsprocs
    for kind in ("argmax_invariant", "non_argmax_invariant"):
        left = [each for each in getattr(having, kind) if not isinstance(each, without)]
        monkeypatch.setattr(having, kind, left)
    assert not pair.run(prompts(4), params).equal


def test_control_a_bias_that_the_plain_argmax_ignores(pair, monkeypatch):
    monkeypatch.setattr(runner_module, "may_change_argmax", lambda _: False)
    assert not pair.run(prompts(4), [sampling_params(row) for row in BIASED]).equal


def test_control_vllms_refusal(pair, monkeypatch):
    monkeypatch.setattr(inherited_checks, "is_ours", lambda _: False)
    for parameter in ({"min_p": 0.2}, {"logit_bias": {5: 2.0}}):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
            pair.trees.generate(prompts(1), sampling_params(seeded(0, **parameter)))
