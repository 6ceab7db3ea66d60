# SPDX-License-Identifier: Apache-2.0
"""Structured outputs: trees, every node masked by the grammar behind its own path."""

import json
import re

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from engine_v1.engines import answers
from engine_v1.tiny_target import prompts
from vllm_redrafter.engine.v1.grammars import Grammars
from vllm_redrafter.engine.v1.request_tree import chain

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
    run = pair.run(prompts(24), batch, vocab=vocabulary(pair))
    run.assert_equal()
    run.assert_saw_trees()
    assert REASON not in pair.trees.stats["fallbacks"]
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


def test_a_grammar_alone_has_trees(pair):
    """Moves are of its own accepted paths: nobody else runs."""
    batch = [params({"regex": COUNTED}, temperature=i % 2, seed=i) for i in range(8)]
    run = pair.run(prompts(8), batch, vocab=vocabulary(pair))
    run.assert_equal()
    run.assert_saw_trees()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_drafter_under_a_grammar(pair, temperature):
    """The engine's own drafts, no oracle's: a random drafter, and what the grammar forces."""
    kinds = [{"choice": ["positive answer", "negative answer"]}, {"json": SCHEMA}, None]
    batch = [params(kinds[i % 3], temperature=temperature, seed=i) for i in range(9)]
    pair.plain.reset()
    expected = pair.plain.generate(prompts(9), batch)
    pair.trees.reset()
    assert answers(pair.trees.generate(prompts(9), batch)) == answers(expected)
    stats = pair.trees.stats
    assert stats["accepted_by_source"]["grammar"] > 20
    assert REASON not in stats["fallbacks"] and not stats["draft_errors"]


def test_a_chain_where_the_grammar_is_elsewhere(pair, monkeypatch):
    """As with a scheduler in another process: vLLM cuts the first chain by itself."""
    monkeypatch.setattr(Grammars, "seen", lambda *_: None)
    batch = [params({"regex": "[a-p]{80}"}, max_tokens=80), *[params(max_tokens=40)] * 5]
    run = pair.run(prompts(6), batch)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.stats["fallbacks"][REASON] > 5


def differs(pair, seeds=8):
    """Whether answers are wrong, and the grammar is broken, with some of the oracle's trees."""
    batch = [params({"regex": COUNTED}, temperature=0, seed=i) for i in range(8)]
    kwargs = {"vocab": vocabulary(pair), "chains": 0, "empty": 0}
    for seed in range(seeds):  # which trees meet which states is chance
        run = pair.run(prompts(8), batch, seed=seed, **kwargs)
        said = [text(pair, o).removesuffix("<eos>") for o in run.got]
        broken = not all(re.fullmatch(COUNTED, each) for each in said)
        if broken and answers(run.got) != answers(run.expected):
            return True
    return False


def test_control_nodes_masked_as_a_chain(pair, monkeypatch):
    """vLLM's own walk: siblings as if they followed each other."""
    assert not differs(pair, 2)
    honest = Grammars.fill_rows
    monkeypatch.setattr(
        Grammars, "fill_rows",
        lambda self, rows, req_id, tree: honest(self, rows, req_id, chain(tree.tokens)),
    )  # fmt: skip
    assert differs(pair)


def test_control_nodes_without_masks(pair, monkeypatch):
    monkeypatch.setattr(Grammars, "fill_rows", lambda self, rows, req_id, tree: rows[1:].fill_(-1))
    assert differs(pair)
