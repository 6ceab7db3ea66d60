# SPDX-License-Identifier: Apache-2.0
"""A seeded request says exactly what it says without drafts: one draw per emitted token."""

from vllm import SamplingParams

from engine_v1.tiny_target import prompts


def sampled(seed, **more):
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 50, **more})


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
