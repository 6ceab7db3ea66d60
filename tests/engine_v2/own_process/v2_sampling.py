# SPDX-License-Identifier: Apache-2.0
"""A seeded request says what it says in plain vLLM; what cannot branch is drafted as a chain."""

import pytest
from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams


def sampled(seed, **more):
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 24, **more})


def test_seeded(pair):
    run = pair.run(prompts(10), [sampled(i) for i in range(10)])
    run.assert_equal()
    run.assert_saw_trees(moves=20)


def test_the_seed_decides(pair):
    run = pair.run([prompts(1)[0]] * 4, [sampled(i, max_tokens=12) for i in range(4)])
    run.assert_equal()
    assert len({tuple(said) for said in tokens(run.got)}) == 4


def test_top_k_top_p_and_temperatures(pair):
    kinds = [
        {"top_p": 0.8},
        {"top_k": 5},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.7},
    ]
    run = pair.run(prompts(8), [sampled(i, **kinds[i % 4]) for i in range(8)])
    run.assert_equal()
    run.assert_saw_trees()


def test_chains_beside_trees(pair):
    """Penalties and bad words: a chain for these requests, trees for their neighbours."""
    kinds = [
        {},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0, "frequency_penalty": 0.7},
        {"temperature": 0},
        {"allowed_token_ids": list(range(100))},
        {"min_tokens": 10, "top_p": 0.9},
        {"temperature": 0.7, "bad_words": ["a", "b"]},
    ]
    run = pair.run(prompts(7), [sampled(i, max_tokens=16, **kinds[i]) for i in range(7)])
    run.assert_equal()
    run.assert_saw_trees(moves=5, accepted=0.5)
    assert pair.trees.stats["fallbacks"] == {
        "penalties (chain)": 2,
        "bad words (chain)": 1,
    }


@pytest.mark.parametrize("most", [None, 33], ids=["at_once", "in_parts"])
def test_logprobs(pair, monkeypatch, most):
    """And the same where two requests of 16 rows are sampled at once, not six."""
    sampler = pair.trees.state.tree_sampler
    rows, draw = [], sampler.sampler.sample

    def sample(logits, *args, **kwargs):
        rows.append(logits.shape[0])
        return draw(logits, *args, **kwargs)

    monkeypatch.setattr(sampler, "max_chunk_rows", most)
    monkeypatch.setattr(sampler.sampler, "sample", sample)
    run = pair.run(prompts(6), [sampled(i, logprobs=3, temperature=i % 2) for i in range(6)])
    run.assert_equal()
    run.assert_saw_trees(moves=5)
    assert max(rows) == (96 if most is None else 32)
    assert pair.trees.stats["steps"] < len(rows)
    for expected, got in zip(run.expected, run.got, strict=True):
        for want, have in zip(expected.outputs[0].logprobs, got.outputs[0].logprobs, strict=True):
            assert list(want) == list(have)
            for token in want:
                assert have[token].logprob == pytest.approx(want[token].logprob, abs=1e-4)
                assert have[token].rank == want[token].rank


def test_structured_output_beside_trees(pair, monkeypatch):
    choice = StructuredOutputsParams(regex="[a-d]{12}")
    params = [
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice if i % 2 else None)
        for i in range(6)
    ]
    # Nodes that a grammar did not check are cut with the logits.
    monkeypatch.setattr(pair.trees.state.tree_sampler, "max_chunk_rows", 33)
    run = pair.run(prompts(6), params)
    run.assert_equal()
    assert pair.trees.stats["fallbacks"] == {"structured output (chain)": 3}
    assert pair.trees.stats["acceptance_length"] > 1.3
