# SPDX-License-Identifier: Apache-2.0
"""A real target, the committed drafter, real prompts: equal in float32 (no tie occurs)."""

import json

import pytest
from engine_cases.questions import (
    DRAFTER,
    QUESTIONS,
    ask,
    assert_real_answers,
    demo_prompts,
    settings,
    target,
)
from engine_v2.process import PARAMETER, outcomes
from vllm import SamplingParams

from engine_v1.engines import engine, tokens
from vllm_redrafter.drafter.config import load_config
from vllm_redrafter.training.fingerprint import of_directory


@pytest.fixture(scope="module")
def smollm2():
    return target()


def answers_as_plain(smollm2, questions, max_tokens):
    """By ReDrafter, equal to plain vLLM's."""
    trees = engine(smollm2, DRAFTER, **settings(4))
    expected = ask(engine(smollm2, **settings(4)), questions, max_tokens)
    got = ask(trees, questions, max_tokens)
    assert got == expected
    assert_real_answers(got, trees.stats)
    return got


def test_four_questions(smollm2):
    answers_as_plain(smollm2, QUESTIONS, 48)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(PARAMETER, ["v2_smollm2.py::test_demo_prompts"])
def test_demo_prompts_on_both_model_runners(smollm2, request, inner):
    on_v1 = answers_as_plain(smollm2, demo_prompts(), 24)
    done = outcomes(request.session)
    done.assert_passed(inner)
    on_v2 = json.loads((done.streams / "smollm2.json").read_text(encoding="utf-8"))
    assert len(on_v2) == 4 and all(on_v2)
    assert on_v2 == on_v1


def run(target, requests, max_tokens, batch_size, spec=None):
    """Tokens of greedy answers, ``batch_size`` at a time, and the engine."""
    drafter = None if spec is None else DRAFTER
    which = engine(target, drafter, **settings(batch_size), **(spec or {}))
    which.reset()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return tokens(which.generate(requests, params)), which


@pytest.fixture(scope="module")
def mt_bench(smollm2):
    from vllm_redrafter.demo.prompts import chat_token_ids, mt_bench, spread

    return chat_token_ids(spread(mt_bench(), 20), smollm2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("batch_size", "count"), [(1, 8), (8, 20)])
def test_mt_bench(smollm2, mt_bench, batch_size, count):
    """The demo compares longer answers, and more of them."""
    questions = mt_bench[:count]
    assert len(questions) == count
    expected, _ = run(smollm2, questions, 64, batch_size)
    for rule in ("best", "beams"):
        got, trees = run(smollm2, questions, 64, batch_size, {"spec_tree": rule})
        assert got == expected, rule
        assert trees.stats["acceptance_length"] > 1.4
        assert trees.stats["moves"] > 0


def test_the_committed_drafter_knows_its_target(smollm2):
    """Whoever converts the target anew, or trains the drafter anew, must write it again."""
    assert load_config(DRAFTER).target == of_directory(smollm2)
