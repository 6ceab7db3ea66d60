# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of every emitted token, wherever on a path it was accepted."""

import pytest
from vllm import SamplingParams

from engine_v1.tiny_target import prompts


def assert_same_rows(got, expected, width):
    """Ids and ranks equal, values close, one row per token."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        if theirs is None:  # the first prompt token has no row
            assert mine is None
            continue
        assert len(theirs) >= width
        assert {k: v.rank for k, v in mine.items()} == {k: v.rank for k, v in theirs.items()}
        for token, entry in theirs.items():
            assert mine[token].logprob == pytest.approx(entry.logprob, abs=1e-4)
            assert mine[token].decoded_token == entry.decoded_token


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_logprobs(pair, temperature):
    """Rows of 1, 5 and no log-probabilities in one batch."""
    widths = [5, None, 1, 5, 0, None, 5, 3]
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=40, logprobs=width)
        for i, width in enumerate(widths)
    ]
    run = pair.run(prompts(8), params)
    run.assert_equal()
    run.assert_saw_trees()
    for width, mine, theirs in zip(widths, run.got, run.expected, strict=True):
        mine, theirs = mine.outputs[0], theirs.outputs[0]
        if width is None:
            assert mine.logprobs is None
            continue
        assert len(mine.logprobs) == len(mine.token_ids)
        assert_same_rows(mine.logprobs, theirs.logprobs, width)
        assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)


def test_prompt_logprobs(pair):
    params = [
        SamplingParams(temperature=0, max_tokens=30, logprobs=2, prompt_logprobs=width)
        for width in (4, None, 1, 4, None, 2, 4, 0)
    ]
    run = pair.run(prompts(8), params)
    run.assert_equal()
    run.assert_saw_trees()
    for parameters, mine, theirs in zip(params, run.got, run.expected, strict=True):
        assert_same_rows(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, 2)
        if parameters.prompt_logprobs is not None:
            assert len(mine.prompt_logprobs) == len(mine.prompt_token_ids)
            assert_same_rows(
                mine.prompt_logprobs, theirs.prompt_logprobs, parameters.prompt_logprobs
            )


def test_logprobs_of_chunked_prompts_beside_trees(make_pair):
    pair = make_pair(max_num_batched_tokens=40, enable_chunked_prefill=True)
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=3, prompt_logprobs=2)
    run = pair.run(prompts(10, shortest=20, longest=120), params)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.mixed_steps > 5
    for mine, theirs in zip(run.got, run.expected, strict=True):
        assert_same_rows(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, 3)
        assert_same_rows(mine.prompt_logprobs, theirs.prompt_logprobs, 2)


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
    for mine, theirs in zip(run.got, run.expected, strict=True):
        assert_same_rows(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, 2)
