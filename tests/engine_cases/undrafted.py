# SPDX-License-Identifier: Apache-2.0
"""Thinking budgets, which get no draft, and prompts of embeddings, which do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_v1.tiny_target import prompts
from safetensors.torch import load_file

from engine_cases.cases import IDS, greedy
from engine_cases.run import assert_same, sampling_params, streams_of

SPEC = {"spec_beam_width": 6, "spec_draft_length": 4, "spec_num_speculative_tokens": 15}
BUDGET = 4
# One token each.
THINK, ENOUGH = "<", ">"

THINKING = "a thinking token budget (no draft)"


def settings() -> dict[str, Any]:
    """Of ``LLM``, for both engines."""
    from vllm.config import ReasoningConfig

    thinking = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=ENOUGH)
    return {"enable_prompt_embeds": True, "reasoning_config": thinking}


def engines(engine: Any, target: Path, drafter: Path) -> tuple[Any, Any]:
    """Plain vLLM and ReDrafter, which drafts by itself.

    Args:
        engine: makes an ``Engine`` of a model runner, as ``engine_v1.engines.engine``.
    """
    more = settings()
    return engine(target, **more), engine(target, drafter, **more, **SPEC)


def check_embeddings_and_budgets(plain: Any, trees: Any, target: Path) -> None:
    """A prompt of embeddings and thinking budgets, beside the same requests without.

    Args:
        plain: an ``Engine`` with ``settings()``.
        trees: the same with ReDrafter, drafting by itself.
    """
    table = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    first, second, *_ = prompts(8)
    second = [*second, IDS.index(THINK)]
    budget = greedy(thinking_token_budget=BUDGET)
    asked = [first, {"prompt_embeds": table[first]}, second, second, second]
    params = [greedy(), greedy(), budget, greedy(), {**budget, "max_tokens": 12}]
    said = _compare(plain, trees, asked, params, {THINKING})
    assert said[1] == said[0], "embeddings of the same tokens say the same"
    # Alone, so that what is accepted is its own.
    _compare(plain, trees, asked[1:2], params[1:2], set())
    assert trees.stats["drafts"] > 3 and trees.stats["acceptance_length"] > 1.2, trees.stats
    end = IDS.index(ENOUGH)
    assert all(end in said[i][: BUDGET + 1] for i in (2, 4)) and end not in said[3][: BUDGET + 1]


def _compare(
    plain: Any,
    trees: Any,
    asked: list[Any],
    params: list[dict[str, Any]],
    reasons: set[str],
) -> list[list[int]]:
    """Tokens of ReDrafter's answers, which are plain vLLM's.

    Args:
        reasons: why requests got no draft.
    """
    objects = [sampling_params(row) for row in params]
    expected, got = [], []
    for engine, streams in ((plain, expected), (trees, got)):
        engine.reset()
        streams += streams_of(engine.generate(asked, objects))
    assert_same(got, expected)
    stats = trees.stats
    assert stats["fallbacks"].keys() == reasons, stats
    assert stats["drafts"] > 3 and stats["acceptance_length"] > 1.2, stats
    return [stream["completions"][0]["tokens"] for stream in got]
