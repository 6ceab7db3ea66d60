# SPDX-License-Identifier: Apache-2.0
"""MT-bench's question file, and which questions are taken."""

import json

import pytest

from vllm_redrafter.demo.fetch import FetchError
from vllm_redrafter.demo.prompts import (
    Prompt,
    parse_questions,
    parse_tasks,
    quoting,
    random_token_ids,
    spread,
)


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


def test_quoting_prompts_hold_the_text_that_is_asked_for():
    prompts = quoting()
    assert len(prompts) == len({p.id for p in prompts}) == len({p.turns for p in prompts}) == 20
    assert {p.category for p in prompts} == {"rewriting", "extraction", "quoting"}
    assert all(len(p.turns) == 1 and len(p.turns[0]) > 500 for p in prompts)


def test_random_prompts_are_the_same_every_time():
    prompts = random_token_ids(3, 50, 320)
    assert random_token_ids(2, 50, 320) == prompts[:2]
    assert [len(set(p)) > 30 for p in prompts] == [True] * 3
    assert all(0 <= token < 320 for p in prompts for token in p)
    assert prompts[0] != prompts[1]
