# SPDX-License-Identifier: Apache-2.0
"""benchmarks/acceptance.py without engines: what is kept, counted, grouped and refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from benchmark_scripts import load_script

from vllm_redrafter.bench.engine_process import SpecCounters, _request_counters
from vllm_redrafter.training.answers import Recorded
from vllm_redrafter.training.replay import Setting

LOOP = [1, 2, 3, 4] * 10


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("acceptance.py", "acceptance_benchmark")


@pytest.fixture
def asked(script):
    return [
        script.Question([7], "MT-bench", "MT-bench: math"),
        script.Question([8], "MT-bench", "MT-bench: writing"),
        script.Question([9], "HumanEval", "HumanEval"),
    ]


@pytest.fixture
def recorded():
    return [
        Recorded([7], list(range(30)), "MT-bench: math", "stop"),
        Recorded([8], LOOP, "MT-bench: writing", "length"),
        Recorded([9], [3, 4], "HumanEval", "stop"),
    ]


class FakeEngine:
    """Stands for `Engine`: answers as recorded, two prompts a batch, with given counters."""

    said: list[list[int]] = []
    counters: list[SpecCounters] = []
    lost = SpecCounters()

    batch_size = 2

    def __init__(self, target, speculation, args):
        self.done = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def answer(self, prompts, **sampling):
        if sampling.get("ignore_eos"):
            assert prompts == [[7 + i, *self.said[i]] for i in range(self.done)][-len(prompts) :]
            return SimpleNamespace(token_ids=[[6] * sampling["max_tokens"]] * len(prompts))
        mine = slice(self.done, self.done + len(prompts))
        self.done += len(prompts)
        return SimpleNamespace(
            token_ids=self.said[mine],
            finish_reasons=["stop", "length", "stop"][mine],
            request_spec=self.counters[mine],
            spec=sum(self.counters[mine], self.lost),
            own={"accepted_by_source": {"drafter": 1, "lookup": 2}},
        )


@pytest.fixture
def fake(script, monkeypatch, recorded):
    class Engine(FakeEngine):
        said = [one.answer for one in recorded]
        counters = [SpecCounters(10, 70, 5, (5,)), SpecCounters(4, 28, 8, (8,)),
                    SpecCounters(1, 7, 0, (0,))]  # fmt: skip

    monkeypatch.setattr(script, "Engine", Engine)
    return Engine


def options(**changed) -> argparse.Namespace:
    values = {"drafter": Path("some-drafter"), "target": Path("some-target"), "tree": "best",
              "max_tokens": 40, "dtype": "float32", "batch_size": 2,
              "lookup": None} | changed  # fmt: skip
    return argparse.Namespace(**values)


def test_counts_are_attributed_to_groups(script, fake, asked, recorded):
    result = script.measure(Setting(4, 3, 7), recorded, Path("t"), options())
    assert result.equal == 3
    figures = script.report(asked, recorded, [result], options())
    lengths = {
        row["group"]: row["settings"]["4,3,7"]["acceptance_length"] for row in figures["groups"]
    }
    assert lengths == {
        "all": 1 + 13 / 15,
        "all, not looping": 1 + 5 / 11,
        "all, looping": 3,
        "MT-bench": 1 + 13 / 14,
        "MT-bench, not looping": 1.5,
        "MT-bench, looping": 3,
        "HumanEval": 1,
        "HumanEval, not looping": 1,
        "HumanEval, looping": None,
        "MT-bench: math": 1.5,
        "MT-bench: writing": 3,
    }
    text = script.markdown(figures)
    assert "| MT-bench | 2 | 70 | 1.929 |" in text and "| HumanEval, looping | 0 | 0 |  |" in text
    assert "(drafter / lookup / both): 4,3,7: 33% / 67% / 0%." in text
    assert "`best` with lookup in the text" in text
    assert "4,3,7: 3 of 3" in text and "Answer with the whole function" in text
    json.dumps(figures, allow_nan=False)


def test_trees_are_those_of_the_replay(script, fake, recorded, monkeypatch):
    """All nodes in every step; a lookup where the tree's rule knows one, unless it is refused."""
    configs = []

    class Engine(fake):
        def __init__(self, target, speculation, args):
            super().__init__(target, speculation, args)
            configs.append(speculation)

    monkeypatch.setattr(script, "Engine", Engine)
    for changed in ({}, {"lookup": False}, {"tree": "beams"}):
        script.measure(Setting(4, 3, 7), recorded, Path("t"), options(**changed))
    assert [config["prompt_lookup"] for config in configs] == [True, False, False]
    assert {config["node_budget"] for config in configs} == {"fixed"}


def test_other_answers_are_a_defect_in_float32_only(script, fake, recorded):
    fake.said = [*fake.said[:2], [3, 5]]
    with pytest.raises(script.Failed, match="only 2 of 3 float32 answers"):
        script.measure(Setting(4, 3, 7), recorded, Path("t"), options())
    assert (
        script.measure(Setting(4, 3, 7), recorded, Path("t"), options(dtype="bfloat16")).equal == 2
    )


def test_counts_that_do_not_add_up_are_refused(script, fake, recorded):
    fake.lost = SpecCounters(1, 7, 1, (1,))
    with pytest.raises(script.Failed, match="are not those of the engine"):
        script.measure(Setting(4, 3, 7), recorded, Path("t"), options())


def test_a_recording_is_read_back_and_only_for_what_it_was_made(
    script, fake, asked, recorded, tmp_path
):
    got = script.record(asked, fake(None, None, None), 40)
    assert [one.answer for one in got] == [one.answer for one in recorded]
    assert [one.finish_reason for one in got] == ["stop", "length", "stop"]
    path = tmp_path / "answers.jsonl"
    script.write_recorded(path, recorded, "float32", 40)
    limited = [dataclasses.replace(one, max_tokens=40) for one in recorded]
    assert script.read_recorded(path, asked, "float32", 40, 50) == limited
    with pytest.raises(script.Failed, match="was recorded with"):
        script.read_recorded(path, asked, "bfloat16", 40, 50)
    with pytest.raises(script.Failed, match="was recorded with"):
        script.read_recorded(path, asked, "float32", 41, 50)
    with pytest.raises(script.Failed, match="answers other prompts"):
        script.read_recorded(path, asked[:2], "float32", 40, 50)


def test_a_histogram_becomes_counters():
    def output(metrics):
        return SimpleNamespace(outputs=[SimpleNamespace(spec_decode_metrics=metrics)])

    # 3 steps accepted nothing, 2 one token, 1 three.
    metrics = SimpleNamespace(histogram=[3, 2, 0, 1], num_draft_tokens=42)
    assert _request_counters([output(metrics)]) == [SpecCounters(6, 42, 5, (3, 1, 1))]
    assert _request_counters([output(metrics), output(None)]) == []
