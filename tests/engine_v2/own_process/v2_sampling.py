# SPDX-License-Identifier: Apache-2.0
"""What the shared cases do not see of sampling: logprobs and grammars beside trees."""

import numpy as np
import pytest
from engine_v1.engines import answers
from engine_v1.tiny_target import EOS, prompts
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from engine_v2.own_process.engines import V2Oracle


def sampled(seed, **more):
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 24, **more})


def test_unseeded(pair):
    """vLLM draws such a request's seed when it comes; with the same seeds the answers are the same.

    So the law is plain vLLM's, whatever was drafted.
    """
    kinds = [{}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 0.7}]
    params = [sampled(None, max_tokens=12, **kind) for kind in kinds]

    def say(engine, seed):
        np.random.seed(seed)
        return engine.generate(prompts(4), params)

    pair.plain.reset()
    expected = say(pair.plain, 1)
    assert answers(say(pair.plain, 2)) != answers(expected), "these seeds decide nothing"
    pair.trees.reset(V2Oracle(expected, 15, range(EOS)))
    assert answers(say(pair.trees, 1)) == answers(expected)
    assert pair.trees.stats["moves"] > 0 and pair.trees.stats["acceptance_length"] > 1.5


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
