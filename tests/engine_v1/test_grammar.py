# SPDX-License-Identifier: Apache-2.0
"""Structured outputs: a chain for the request that has a grammar, trees for its neighbours."""

import dataclasses
import json
import re

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from engine_v1 import oracle as oracle_module
from engine_v1.engines import answers
from engine_v1.tiny_target import prompts
from vllm_redrafter.engine.v1.request_tree import RequestTree

REASON = "structured output (chain)"
# How many characters were said decides what may follow: a mask of the wrong depth shows.
COUNTED = r"[a-p]{6}[0-9]{6}[a-p]{6}[0-9]{6}"
CHARACTERS = [*range(ord("a"), ord("p") + 1), *range(ord("0"), ord("9") + 1)]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def params(structured=None, **more):
    return SamplingParams(
        **{"temperature": 0, "max_tokens": 60, **more},
        structured_outputs=StructuredOutputsParams(**structured) if structured else None,
    )


def text(pair, output):
    return pair.plain.llm.get_tokenizer().decode(output.outputs[0].token_ids)


def vocabulary(pair):
    """Token ids of the characters of ``COUNTED``."""
    tokenizer = pair.plain.llm.get_tokenizer()
    return [tokenizer.encode(chr(code))[0] for code in CHARACTERS]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_grammar_requests_beside_tree_requests(pair, temperature):
    kinds = [
        {"regex": COUNTED},
        None,
        {"choice": ["positive answer", "negative answer", "neither of them"]},
        None,
        {"json": SCHEMA},
        None,
        {"regex": r"(yes|no), [0-9]{1,8}"},
        None,
    ]
    batch = [params(kinds[i % 8], temperature=temperature, seed=i) for i in range(24)]
    run = pair.run(prompts(24), batch, chain_first=True, vocab=vocabulary(pair))
    run.assert_equal()
    stats = pair.trees.stats
    assert stats["fallbacks"][REASON] > 20
    assert stats["acceptance_length"] > 2
    for i, output in enumerate(run.got):
        said = text(pair, output).removesuffix("<eos>")
        if kinds[i % 8] and "regex" in kinds[i % 8]:
            assert re.fullmatch(kinds[i % 8]["regex"], said)
        if kinds[i % 8] and "choice" in kinds[i % 8]:
            assert said in kinds[i % 8]["choice"]
        if kinds[i % 8] and "json" in kinds[i % 8] and output.outputs[0].finish_reason == "stop":
            assert set(json.loads(said)) == {"name", "age"}


def test_grammar_requests_of_one_prompt_token(pair):
    """vLLM pads them with drafts that mean nothing; the grammar must not see those."""
    batch = [params({"regex": COUNTED}), params()] * 8
    run = pair.run([prompt[:1] for prompt in prompts(16)], batch, vocab=vocabulary(pair))
    run.assert_equal()
    for output in run.got[0::2]:
        assert re.fullmatch(COUNTED, text(pair, output).removesuffix("<eos>"))


def test_neighbours_keep_their_trees(pair):
    """Per request, never per batch: moves happen while a grammar request runs beside."""
    batch = [params({"regex": "[a-p]{80}"}, max_tokens=80), *[params(max_tokens=40)] * 5]
    run = pair.run(prompts(6), batch)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.stats["fallbacks"][REASON] > 5


class UncutTree(RequestTree):
    """A tree that the runner's fallback does not cut to its first chain."""

    @property
    def chain_length(self):
        return len(self.tokens)

    @property
    def is_chain(self):
        return self.parents == list(range(len(self.parents)))


def test_control_trees_for_grammar_requests(pair, monkeypatch):
    """Without the fallback the grammar runs along siblings as if they followed each other."""
    honest = oracle_module.request_tree

    def uncut(tokens, parents):
        tree = honest(tokens, parents)
        return UncutTree(**{f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)})

    batch = [params({"regex": COUNTED}, temperature=0, seed=i) for i in range(8)]
    kwargs = {"vocab": vocabulary(pair), "chains": 0, "empty": 0}
    pair.run(prompts(8), batch, **kwargs).assert_equal()
    monkeypatch.setattr(oracle_module, "request_tree", uncut)
    for seed in range(8):  # which trees meet which states is chance
        run = pair.run(prompts(8), batch, seed=seed, **kwargs)
        if answers(run.got) != answers(run.expected):
            break
    else:
        pytest.fail("nothing was seen")
    assert not all(re.fullmatch(COUNTED, text(pair, o).removesuffix("<eos>")) for o in run.got)
