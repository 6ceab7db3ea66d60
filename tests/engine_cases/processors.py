# SPDX-License-Identifier: Apache-2.0
"""Requests that ask for a custom logits processor (``leaning``), beside such that do not."""

from __future__ import annotations

from typing import Any

from engine_v1.engines import answers
from engine_v1.tiny_target import prompts

from engine_cases.cases import greedy, seeded
from engine_cases.run import sampling_params

ASKED = {"extra_args": {"lean": 12.0}}

REASON_V1 = "custom logits processors (no draft)"
REASON_V2 = "custom logits processors (chain)"


def run(pair: Any, count: int, tokens: int) -> Any:
    """``count`` requests of every kind in turn: asking or not, greedy or seeded."""
    kinds = [greedy(**ASKED), greedy(), seeded(2, **ASKED), seeded(3)]
    params = [sampling_params(kinds[i % 4] | {"max_tokens": tokens}) for i in range(count)]
    return pair.run(prompts(count), params)


def check(pair: Any, reason: str, count: int = 12, tokens: int = 24) -> None:
    """All say what they say in plain vLLM; those that ask are counted, and the others have trees.

    Args:
        pair: of engines with a runner's processor.
        reason: to be counted.
        count: requests; ``tokens`` of each.
    """
    found = run(pair, count, tokens)
    found.assert_equal()
    found.assert_saw_trees(moves=2, accepted=0.3)
    stats = pair.trees.stats
    assert stats["fallbacks"].keys() == {reason}, stats
    without = pair.plain.generate(prompts(1), sampling_params(greedy(max_tokens=tokens)))
    assert answers(without) != answers(found.expected[:1]), "it changes nothing"
