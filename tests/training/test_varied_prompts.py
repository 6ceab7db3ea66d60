# SPDX-License-Identifier: Apache-2.0
"""examples/varied_prompts.py: every slot is filled, from a small stand-in for Corpora."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "varied_prompts.py"


@pytest.fixture(scope="module")
def example():
    # Its other half lies beside it, as for a script.
    sys.path.insert(0, str(EXAMPLE.parent))
    spec = importlib.util.spec_from_file_location("varied_prompts_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLE.parent))
    return module


@pytest.fixture
def corpora(tmp_path, example):
    """Files of the three shapes that Corpora has: words, objects with names, lists in objects."""
    for number, file in enumerate(sorted({f for files in example.SLOTS.values() for f in files})):
        words = [f"w{number}x{i}" for i in range(4)]
        shape = ([*words], [{"name": w, "note": "no word"} for w in words], [{"of": words}])
        path = tmp_path / "corpora" / "data" / f"{file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"description": "no word", "list": shape[number % 3]}))
    return tmp_path / "corpora"


def written(example, monkeypatch, out: Path, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["varied_prompts.py", str(out), *arguments])
    example.main()
    return [json.loads(line)["prompt"] for line in out.read_text().splitlines()]


def test_every_task_can_be_asked(example, corpora):
    slots = example.read_slots(corpora)
    assert all(len(words) >= 4 for words in slots.values())
    assert not any("no word" in words for words in slots.values())
    rng = example.random.Random(0)
    fill = example.filler(slots, ["A passage."], rng)
    tasks = [t for kind in json.loads(example.TASKS.read_text()).values() for t in kind]
    for task in tasks:
        assert not set("{}") & set(fill(task))
    three = fill("{name} and {name2} and {name3}").split(" and ")
    assert len(set(three)) == 3


def test_a_file_of_prompts(example, corpora, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    doc = "Sum of all even numbers among those that are given."
    (source / "a.py").write_text(
        f'def even(xs: list[int]) -> int:\n    """{doc}"""\n    return 0\n'
        f'class A:\n    def method(self):\n        """{doc}"""\n'
    )
    assert example.function_heads(source) == [
        f'def even(xs: list[int]) -> int:\n    """{doc}\n    """\n'
    ]
    arguments = ("--corpora", str(corpora), "--sources", str(source), "--tasks", "60",
                 "--functions", "20", "--seed", "3")  # fmt: skip
    prompts = written(example, monkeypatch, tmp_path / "p.jsonl", *arguments)
    assert len(prompts) == len(set(prompts)) > 70
    assert sum("def " in prompt and '"""' in prompt for prompt in prompts) == 20
    assert not any("{passage}" in prompt for prompt in prompts)
    assert written(example, monkeypatch, tmp_path / "q.jsonl", *arguments) == prompts


def test_passages_are_paragraphs_of_the_answers(example, tmp_path, monkeypatch):
    long = "word " * 40

    class Tokenizer:
        @staticmethod
        def from_pretrained(target):
            return Tokenizer()

        def decode(self, tokens, skip_special_tokens):
            assert tokens.tolist() == [7, 8]  # the answer alone
            return f"too short\n\n{long.strip()}\n\n{long * 5}"

    monkeypatch.setattr("transformers.AutoTokenizer", Tokenizer)
    data = type("Data", (), {"tokens": [torch.tensor([5, 7, 8])],
                             "answer": [torch.tensor([False, True, True])]})  # fmt: skip
    monkeypatch.setattr("vllm_redrafter.training.dataset.load_dataset", lambda path: data)
    assert example.read_passages(tmp_path, "target") == [long.strip()]


def test_made_functions_are_functions_and_their_parts_mean_what_they_say(example):
    rng = example.random.Random(4)
    made = [example.made_function(rng) for _ in range(300)]
    assert len(set(made)) == 300
    for text in made:
        ast.parse(text)
    # What the parts mean, in other words.
    numbers, k = [3, -4, 8, 8, 12], 4
    parts = sys.modules["made_functions"]
    chosen = parts.CHOSEN["even "](numbers, k)
    limited = parts.LIMITED[" that are divisible by {k}"](chosen, k)
    assert parts.RESULTS["the sum of the {}"][1](limited) == 24
    assert parts.RESULTS["a list of the running totals of the {}"][1](limited) == [-4, 4, 12, 24]


def test_made_functions_are_among_the_prompts(example, corpora, tmp_path, monkeypatch):
    prompts = written(example, monkeypatch, tmp_path / "p", "--corpora", str(corpora),
                      "--tasks", "2", "--functions", "0", "--made-functions", "9")  # fmt: skip
    assert len(prompts) == 11 and sum("def " in prompt for prompt in prompts) >= 9
