# SPDX-License-Identifier: Apache-2.0
"""MT-bench's question file, and which questions are taken."""

import json

import pytest

from vllm_redrafter.demo.fetch import FetchError
from vllm_redrafter.demo.prompts import Prompt, parse_questions, parse_tasks, spread


def line(number, category, *turns):
    question = {"question_id": number, "category": category, "turns": turns, "reference": []}
    return json.dumps(question)


def test_questions_are_parsed():
    lines = [line(81, "writing", "Write.", "Again."), "", line(101, "math", "1 + 1 = ?")]
    assert parse_questions(lines) == [
        Prompt(81, "writing", ("Write.", "Again.")),
        Prompt(101, "math", ("1 + 1 = ?",)),
    ]


@pytest.mark.parametrize(
    "bad",
    ["{not json", "[]", '{"question_id": 1, "category": "x"}', line(1, "x"), line(1, "x", ""),
     '{"question_id": "a", "category": "x", "turns": ["t"]}'],
)  # fmt: skip
def test_a_bad_line_is_named(bad):
    with pytest.raises(FetchError, match="^line 2 of question.jsonl"):
        parse_questions([line(81, "writing", "Write."), bad])


def test_a_few_prompts_come_from_all_categories():
    prompts = [Prompt(i, "abc"[i // 3], ("t",)) for i in range(9)]
    assert [p.id for p in spread(prompts, 5)] == [0, 3, 6, 1, 4]
    assert sorted(p.id for p in spread(prompts, 80)) == list(range(9))
    assert spread([], 3) == []


def test_uneven_categories():
    prompts = [Prompt(0, "a", ("t",)), Prompt(1, "b", ("t",)), Prompt(2, "b", ("t",))]
    assert [p.id for p in spread(prompts, 3)] == [0, 1, 2]


def test_human_eval_tasks_become_turns():
    task = json.dumps({"task_id": "HumanEval/7", "prompt": "def f(x):\n    # {x}\n", "test": ""})
    (prompt,) = parse_tasks(["", task])
    assert (prompt.id, prompt.category) == (7, "HumanEval")
    assert prompt.turns[0].endswith("block.\n\n```python\ndef f(x):\n    # {x}\n```")


@pytest.mark.parametrize(
    "bad", ["{not", "[]", '{"task_id": "HumanEval/1"}', '{"task_id": 3, "prompt": "x"}',
            '{"task_id": "HumanEval/1", "prompt": " "}', '{"task_id": "x", "prompt": "x"}'],
)  # fmt: skip
def test_a_bad_task_is_named(bad):
    with pytest.raises(FetchError, match="^line 2 of HumanEval.jsonl"):
        parse_tasks(["", bad])
