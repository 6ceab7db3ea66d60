# SPDX-License-Identifier: Apache-2.0
"""A seeded request says exactly what it says without drafts: one draw per emitted token."""

from vllm import SamplingParams

from engine_v1.engines import answers
from engine_v1.tiny_target import EOS, prompts


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


def test_prompts_in_parts(pair, make_pair):
    """Plain vLLM's engine ends here, so what it says with whole prompts is the reference."""
    params = [sampled(i, max_tokens=20, ignore_eos=True) for i in range(8)]
    batch = prompts(8, shortest=50, longest=90, seed=5)
    pair.plain.reset()
    expected = pair.plain.generate(batch, params)
    parts = make_pair(max_num_batched_tokens=48).trees
    parts.reset(pair.make_oracle(expected, parts.most_nodes, range(EOS), seed=1))
    assert answers(parts.generate(batch, params)) == answers(expected)
    assert parts.stats["moves"] > 5


def test_preempted_and_prefilled_again_in_parts(pair, make_pair):
    """A generator that has drawn already keeps its place."""
    params = [sampled(i, max_tokens=100, ignore_eos=True) for i in range(12)]
    batch = prompts(12, shortest=20, longest=30)
    pair.plain.reset()
    expected = pair.plain.generate(batch, params)
    parts = make_pair(max_num_batched_tokens=48, num_gpu_blocks_override=16).trees
    parts.reset(pair.make_oracle(expected, parts.most_nodes, range(EOS), seed=1))
    assert answers(parts.generate(batch, params)) == answers(expected)
    assert parts.preemptions > 3 and parts.stats["moves"] > 5
