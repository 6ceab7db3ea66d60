# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters mean what they mean without drafts."""

from vllm import SamplingParams

from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts


def greedy(**more):
    return SamplingParams(**{"temperature": 0, "max_tokens": 50, **more})


def said_by_plain(pair, batch):
    """Tokens of plain vLLM's answers to these prompts without any further parameter."""
    return tokens(free_outputs(pair, batch))


def free_outputs(pair, batch):
    pair.plain.reset()
    return pair.plain.generate(batch, greedy(ignore_eos=True))


def test_repetition_presence_and_frequency_penalties(pair):
    kinds = [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 1.2, "presence_penalty": 0.7, "frequency_penalty": 0.6},
        {"frequency_penalty": -0.3},
        {},
    ]
    batch = prompts(24)
    run = pair.run(batch, [greedy(**kinds[i % 6], ignore_eos=True) for i in range(24)])
    run.assert_equal()
    run.assert_saw_trees()
    free = said_by_plain(pair, batch)
    changed = [a != b for a, b in zip(tokens(run.got), free, strict=True)]
    assert sum(changed) >= 15  # the penalties did something


def test_stop_tokens_inside_an_accepted_path(pair):
    batch = prompts(16)
    free = free_outputs(pair, batch)
    # Some token of the middle of each answer ends it; the drafter knows how it would go on.
    params = [greedy(stop_token_ids=[said[5 + i]]) for i, said in enumerate(tokens(free))]
    run = pair.run(batch, params, answers=free, chains=0.3, empty=0)
    run.assert_equal()
    assert all(output.outputs[0].finish_reason == "stop" for output in run.got)
    # Drafts went on behind the stop token, and no walk did.
    walked = sum(len(emitted) for _, emitted in pair.trees.emitted)
    assert walked == sum(map(len, tokens(run.got)))
    assert pair.trees.stats["nodes_per_draft"] > 2 * pair.trees.stats["acceptance_length"]
