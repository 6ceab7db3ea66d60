# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of every emitted token, wherever on a path it was accepted."""

import pytest
from engine_cases.run import assert_same, streams_of
from vllm import SamplingParams

from engine_v1.tiny_target import prompts


def assert_same_logprobs(run):
    got, expected = streams_of(run.got), streams_of(run.expected)
    assert all(stream["completions"][0]["logprobs"] for stream in expected)
    assert_same(got, expected)


def test_logprobs_of_chunked_prompts_beside_trees(make_pair):
    pair = make_pair(max_num_batched_tokens=40, enable_chunked_prefill=True)
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=3, prompt_logprobs=2)
    run = pair.run(prompts(10, shortest=20, longest=120), params)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.mixed_steps > 5
    assert_same_logprobs(run)
    assert all(output.prompt_logprobs for output in run.expected)


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_logprobs_modes(make_pair, mode):
    """What the numbers mean is a setting of the engine; processed ones count penalties in."""
    pair = make_pair(logprobs_mode=mode)
    params = [
        SamplingParams(
            temperature=0.8 * (i % 2), seed=i, top_k=20, frequency_penalty=0.5, max_tokens=30,
            logprobs=2,
        )
        for i in range(8)
    ]  # fmt: skip
    run = pair.run(prompts(8), params)
    run.assert_equal()
    run.assert_saw_trees(moves=10)
    assert_same_logprobs(run)
