# SPDX-License-Identifier: Apache-2.0
"""Questions for the demo's target and the committed drafter, on either model runner."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine_v1.engines import tokens
from vllm import SamplingParams

import vllm_redrafter
from vllm_redrafter.demo.prompts import Prompt, chat_token_ids, mt_bench, spread

DRAFTER = Path(vllm_redrafter.__file__).parent / "drafters" / "redrafter-smollm2-135m"

QUESTIONS = [
    Prompt(i, "test", (text,))
    for i, text in enumerate(
        [
            "What is the capital of France and why?",
            "Write a short poem about the sea.",
            "Explain photosynthesis to a child.",
            "List three uses of a brick.",
        ]
    )
]


def target() -> Path:
    """``VLLM_REDRAFTER_TARGET``, or the demo's target, downloaded at the first use."""
    if given := os.environ.get("VLLM_REDRAFTER_TARGET"):
        return Path(given)
    from vllm_redrafter.demo.target import smollm2

    return smollm2()


def demo_prompts() -> list[Prompt]:
    """The first four that the demo asks."""
    return spread(mt_bench(), 4)


def ask(engine: Any, questions: list[Prompt], max_tokens: int) -> list[list[int]]:
    """Greedy answers of an ``Engine``."""
    engine.reset()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return tokens(engine.generate(chat_token_ids(questions, target()), params))


def settings(batch_size: int) -> dict[str, Any]:
    """Of ``LLM``, for both engines."""
    return {
        "max_model_len": 1024, "max_num_seqs": batch_size, "block_size": 128,
        "num_gpu_blocks_override": 80,
    }  # fmt: skip


def assert_real_answers(said: list[list[int]], stats: dict[str, Any]) -> None:
    """Answers that do not repeat a few tokens, and drafts of which some were accepted."""
    assert sum(len(set(row)) > 15 for row in said) >= 3
    assert stats["acceptance_length"] > 1.4, stats
    assert stats["moves"] > 0, stats
