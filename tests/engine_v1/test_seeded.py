# SPDX-License-Identifier: Apache-2.0
"""A seeded request says exactly what it says without drafts: one draw per emitted token."""

from vllm import SamplingParams

from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts


def sampled(seed, **more):
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 50, **more})


def test_temperature_one(pair):
    run = pair.run(prompts(24), [sampled(i) for i in range(24)])
    run.assert_equal()
    run.assert_saw_trees(moves=100)


def test_the_seed_decides(pair):
    """The same prompt sixteen times: the tokens come from the draws, not from the argmax."""
    run = pair.run([prompts(1)[0]] * 16, [sampled(i) for i in range(16)])
    run.assert_equal()
    assert len({tuple(said) for said in tokens(run.got)}) == 16


def test_top_k_top_p_and_temperatures(pair):
    kinds = [
        {"top_p": 0.8},
        {"top_k": 5},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.7},
    ]
    run = pair.run(prompts(24), [sampled(i, **kinds[i % 4]) for i in range(24)])
    run.assert_equal()
    run.assert_saw_trees()


def test_mixed_with_greedy_penalties_and_limits(pair):
    kinds = [
        {},
        {"temperature": 0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0, "frequency_penalty": 0.7},
        {"allowed_token_ids": list(range(100))},
        {"min_tokens": 20, "top_p": 0.9},
        {"logprobs": 2},
    ]
    params = [sampled(i, **kinds[i % 7]) for i in range(28)]
    run = pair.run(prompts(28), params)
    run.assert_equal()
    run.assert_saw_trees()


def test_preempted(make_pair):
    pair = make_pair(num_gpu_blocks_override=16)
    params = [sampled(i, max_tokens=100, ignore_eos=True) for i in range(12)]
    run = pair.run(prompts(12, shortest=20, longest=30), params)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.preemptions > 3


def test_batch_1(pair):
    for seed in range(4):
        run = pair.run([prompts(4)[seed]], sampled(seed))
        run.assert_equal()
