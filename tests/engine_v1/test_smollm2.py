# SPDX-License-Identifier: Apache-2.0
"""A real target, the committed drafter, real prompts: equal in float32, token for token."""

import os
from pathlib import Path

import pytest
from vllm import SamplingParams

import vllm_redrafter
from engine_v1.engines import engine, tokens

DRAFTER = Path(vllm_redrafter.__file__).parent / "drafters" / "redrafter-smollm2-135m"

QUESTIONS = [
    "What is the capital of France and why?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a brick.",
]


@pytest.fixture(scope="module")
def smollm2():
    """``VLLM_REDRAFTER_TARGET``, or the demo's target, downloaded at the first use."""
    if given := os.environ.get("VLLM_REDRAFTER_TARGET"):
        return Path(given)
    from vllm_redrafter.demo.target import smollm2

    return smollm2()


def run(target, requests, max_tokens, batch_size, spec=None):
    """Tokens of greedy answers, ``batch_size`` at a time, and the engine."""
    settings = {"max_model_len": 1024, "max_num_seqs": batch_size, "block_size": 128}
    drafter = None if spec is None else DRAFTER
    which = engine(target, drafter, num_gpu_blocks_override=80, **settings, **(spec or {}))
    which.reset()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return tokens(which.generate(requests, params)), which


@pytest.fixture(scope="module")
def questions(smollm2):
    from vllm_redrafter.demo.prompts import Prompt, chat_token_ids

    prompts = [Prompt(i, "test", (text,)) for i, text in enumerate(QUESTIONS)]
    return chat_token_ids(prompts, smollm2)


def test_four_questions(smollm2, questions):
    expected, _ = run(smollm2, questions, 48, 4)
    got, trees = run(smollm2, questions, 48, 4, {})
    assert got == expected
    assert sum(len(set(said)) > 15 for said in got) >= 3
    assert trees.stats["acceptance_length"] > 1.4
    assert trees.stats["moves"] > 0


@pytest.fixture(scope="module")
def mt_bench(smollm2):
    from vllm_redrafter.demo.prompts import chat_token_ids, mt_bench, spread

    return chat_token_ids(spread(mt_bench(), 20), smollm2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_mt_bench(smollm2, mt_bench, batch_size):
    assert len(mt_bench) >= 20
    expected, _ = run(smollm2, mt_bench, 128, batch_size)
    for rule in ("best", "beams"):
        got, trees = run(smollm2, mt_bench, 128, batch_size, {"spec_tree": rule})
        assert got == expected, rule
        assert trees.stats["acceptance_length"] > 1.4
        assert trees.stats["moves"] > 0
