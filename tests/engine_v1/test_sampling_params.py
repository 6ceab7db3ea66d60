# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter that vLLM allows beside speculation means what it means without."""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from engine_v1.engines import tokens
from engine_v1.tiny_target import EOS, prompts


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
    # Walks went on behind the stop token, and what they emitted there was dropped.
    walked = sum(len(emitted) for _, emitted in pair.trees.emitted)
    assert walked >= sum(map(len, tokens(run.got))) + 20


def test_the_end_token_and_ignore_eos(pair):
    batch = prompts(40)
    run = pair.run(batch, [greedy(ignore_eos=i % 2 == 1, max_tokens=100) for i in range(40)])
    run.assert_equal()
    run.assert_saw_trees()
    said = tokens(run.got)
    assert any(row[-1] == EOS and len(row) < 100 for row in said[0::2])
    assert any(EOS in row[:-1] for row in said[1::2])


def test_min_tokens(pair):
    batch = prompts(16)
    free = said_by_plain(pair, batch)
    # Without min_tokens all would stop at the sixth token; they must say something else there.
    params = [greedy(stop_token_ids=[said[5]], min_tokens=10 + i) for i, said in enumerate(free)]
    run = pair.run(batch, params)
    run.assert_equal()
    run.assert_saw_trees()
    assert all(len(said) >= 10 + i for i, said in enumerate(tokens(run.got)))


def test_allowed_token_ids(pair):
    allowed = list(range(20, 60))
    params = [greedy(**({"allowed_token_ids": allowed} if i % 3 else {})) for i in range(16)]
    run = pair.run(prompts(16), params)
    run.assert_equal()
    run.assert_saw_trees()
    for i, said in enumerate(tokens(run.got)):
        assert (set(said) <= set(allowed)) == bool(i % 3)


def test_bad_words(pair):
    """Single tokens and pairs of tokens, of which the second is forbidden behind the first."""
    tokenizer = pair.plain.llm.get_tokenizer()
    batch = prompts(60)
    params, words = [], []
    for said in said_by_plain(pair, batch):
        word = tokenizer.decode(said[3:5])
        # Not every pair of bytes is a text.
        word = word if tokenizer.encode(word) == said[3:5] else None
        words.append(word and said[3:5])
        params.append(greedy(bad_words=[word] if word else None, ignore_eos=True))
    assert sum(map(bool, words)) >= 8
    run = pair.run(batch, params)
    run.assert_equal()
    run.assert_saw_trees()
    for said, word in zip(tokens(run.got), words, strict=True):
        if word:
            assert word not in [said[i : i + 2] for i in range(len(said))]


def test_stop_strings(pair):
    """The front end cuts them, in the middle of what one step delivered."""
    tokenizer = pair.plain.llm.get_tokenizer()
    batch = prompts(16)
    params = []
    for said in said_by_plain(pair, batch):
        letters = [tokenizer.decode([token]) for token in said[4:]]
        stop = next(letter for letter in letters if letter.isascii())
        params.append(greedy(stop=[stop]))
    run = pair.run(batch, params)
    run.assert_equal()
    assert [o.outputs[0].text for o in run.got] == [o.outputs[0].text for o in run.expected]
    assert sum(output.outputs[0].finish_reason == "stop" for output in run.got) == 16


def test_several_completions(pair):
    params = SamplingParams(n=3, temperature=0.8, seed=5, max_tokens=30)
    run = pair.run(prompts(6), params)
    run.assert_equal()
    run.assert_saw_trees()
    for output in run.got:
        assert len({tuple(c.token_ids) for c in output.outputs}) == 3


@pytest.mark.parametrize("parameter", [{"min_p": 0.2}, {"logit_bias": {5: 2.0}}])
def test_what_vllm_refuses_beside_speculation(pair, parameter):
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=4, **parameter)
    message = "min_p and logit_bias .* not yet supported with speculative decoding"
    with pytest.raises(VLLMValidationError, match=message):
        pair.trees.generate(prompts(1), params)
    pair.plain.generate(prompts(1), params)
