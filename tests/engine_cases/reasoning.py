# SPDX-License-Identifier: Apache-2.0
"""Structured output behind a reasoning section, with and without a thinking budget."""

from __future__ import annotations

import re
from typing import Any

from engine_v1.tiny_target import EOS, prompts
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

from engine_cases.cases import IDS, LETTERS, greedy, letters, seeded
from engine_cases.run import sampling_params
from engine_cases.undrafted import THINK, THINKING

END = ">"
NAME = "in-brackets"
GRAMMAR = "structured output (chain)"
# How many characters were said decides what may follow.
COUNTED = {"regex": r"[a-p]{4}[0-9]{4}[a-p]{4}"}
# Of an answer that was cut.
PREFIX = r"[a-p]{1,4}|[a-p]{4}[0-9]{1,4}|[a-p]{4}[0-9]{4}[a-p]{1,4}"


class InBrackets(BaseThinkingReasoningParser):
    """Reasons between two tokens of one byte each."""

    start_token, end_token = THINK, END


def settings() -> dict[str, Any]:
    """Of ``LLM``; registers the parser with this process."""
    from vllm.config import ReasoningConfig

    ReasoningParserManager.register_module(NAME, force=True, module=InBrackets)
    budgets = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=END)
    return {"reasoning_parser": NAME, "reasoning_config": budgets}


def check(pair: Any, count: int = 12, tokens: int = 40) -> None:
    """Concurrent requests: reasoning and a grammar, a grammar alone, reasoning alone, budgets.

    Args:
        pair: of engines with ``settings()``.
        count: requests; at most ``tokens`` of each.
    """
    end = IDS.index(END)
    # Without help this target would reason for ever.
    ends = {"logit_bias": {end: 7.0}}
    counted = {"structured_outputs": COUNTED}
    kinds = [
        greedy(**counted, **ends),
        greedy(**counted, thinking_token_budget=3),
        seeded(2, **counted, **ends),
        greedy(),
        greedy(thinking_token_budget=3),
        seeded(5, **ends),
    ]
    batch = [[*prompt, IDS.index(THINK)] for prompt in prompts(count)]
    params = [sampling_params({**kinds[i % 6], "max_tokens": tokens}) for i in range(count)]
    run = pair.run(batch, params, chain_first=True, vocab=[*LETTERS, end])
    run.assert_equal()
    stats = pair.trees.stats
    assert stats["fallbacks"].keys() == {GRAMMAR, THINKING}, stats
    assert stats["acceptance_length"] > 1.5, stats
    for i, output in enumerate(run.got):
        if i % 6 < 3:
            said = [token for token in output.outputs[0].token_ids if token != EOS]
            assert end in said[:-2], said
            answer = letters(*said[said.index(end) + 1 :])
            assert answer and re.fullmatch(PREFIX, answer), said
            assert re.fullmatch(COUNTED["regex"], answer) or len(said) == tokens
