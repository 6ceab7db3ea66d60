# SPDX-License-Identifier: Apache-2.0
"""benchmarks/load.py with engines faked: batches, what is alive when, time, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import BENCHMARKS, load_script

from vllm_redrafter.bench import compare as compare_module
from vllm_redrafter.bench import engines as engines_module
from vllm_redrafter.bench.engine_process import Generation, SpecCounters

LOOP = [1, 2] * 20


class FakeEngine:
    """Two tokens a second in plain vLLM, more in others; the first prompt's answer loops."""

    alive: set[str] = set()
    most_alive = 0
    calls: list[tuple[str, int]] = []

    def __init__(self, name, kwargs, env):
        self.name, self.kwargs = name, kwargs

    def start(self):
        FakeEngine.alive.add(self.name)
        FakeEngine.most_alive = max(FakeEngine.most_alive, len(FakeEngine.alive))

    def stop(self):
        FakeEngine.alive.discard(self.name)

    def wait_ready(self):
        return 1.0

    def peak_rss_bytes(self):
        return 5

    def generate(self, prompts, sampling):
        one = sampling if isinstance(sampling, dict) else sampling[0]
        if one["max_tokens"] != 16:
            FakeEngine.calls.append((self.name, len(prompts)))
        ids = [LOOP if prompt[0] == 0 else list(range(40)) for prompt in prompts]
        seconds = {"plain": 20.0, "redrafter": 10.0 if LOOP in ids else 16.0}.get(self.name, 25.0)
        own, spec = {}, SpecCounters()
        if self.name == "redrafter":
            spec = SpecCounters(10, 70, 15)
            own = {"accepted_by_source": {"drafter": 5, "lookup": 4, "both": 1},
                   "draft_shapes": {"4,3": 3, "0,0": 1},
                   "sums": {"drafts": 10, "acceptance_length": 25, "predicted_acceptance": 24,
                            "timed_steps": 10, "predicted_step_ms": 400, "real_step_ms": 410,
                            "steps": 9, "steps_without_nodes": 1},
                   }  # fmt: skip
        return Generation(ids, [""] * len(ids), seconds, seconds, 11, spec, own=own)


@pytest.fixture
def script(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = load_script("load.py", "load_benchmark")
    FakeEngine.alive, FakeEngine.most_alive, FakeEngine.calls = set(), 0, []
    monkeypatch.setattr(engines_module, "EngineProcess", FakeEngine)
    monkeypatch.setattr(
        script, "chat_token_ids", lambda prompts, target: [[i, 1, 1] for i in range(len(prompts))]
    )
    return script


@pytest.fixture
def target(tmp_path) -> Path:
    """All that is read of it."""
    (tmp_path / "a-target").mkdir()
    (tmp_path / "a-target" / "config.json").write_text(json.dumps({
        "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64,
        "num_key_value_heads": 2}))  # fmt: skip
    return tmp_path / "a-target"


def command(target: Path, *argv: str) -> list[str]:
    return ["--target", str(target), "--set", "quoting", "--out", str(target / "out"), *argv]


def test_every_batch_size_on_running_engines(script, target, capsys):
    script.main(command(target, "--prompts", "5", "--batch-sizes", "1", "2", "8", "--rounds", "1",
                        "--variants", "redrafter", "ngram"))  # fmt: skip
    mine = [size for name, size in FakeEngine.calls if name == "redrafter"]
    assert mine == [1, 1, 1, 1, 1, 2, 2, 8]  # full batches only; 5 prompts fill one of 8
    assert sorted(FakeEngine.calls[:3]) == [("ngram", 1), ("plain", 1), ("redrafter", 1)]
    assert FakeEngine.most_alive == 3 and not FakeEngine.alive

    report = json.loads((target / "out" / "load.json").read_text())
    assert [result["batch_size"] for result in report["results"]] == [1, 2, 8]
    first = report["results"][0]
    assert (first["groups"], first["looping_groups"], first["calls"]) == (5, 1, 5)
    ours = first["variants"]["redrafter"]
    assert ours["looping"]["ratio"]["overall"] == pytest.approx(2)
    assert ours["not looping"]["ratio"]["overall"] == pytest.approx(1.25)
    assert ours["all"]["ratio"]["overall"] == pytest.approx(100 / 74)
    assert "looping" not in report["results"][1]["variants"]["redrafter"]
    assert first["variants"]["ngram"]["all"]["ratio"]["overall"] == pytest.approx(0.8)
    assert str(target) not in json.dumps(report) and "token_ids" not in json.dumps(report)
    assert report["variants"]["redrafter"]["model"] == "redrafter-smollm2-135m"

    text = (target / "out" / "load.md").read_text()
    assert capsys.readouterr().out == text
    rows = [line for line in text.splitlines() if line.startswith("| 1 | ReDrafter |")]
    assert rows == [
        "| 1 | ReDrafter | 5 | 2.7 | 1.35 (1.25; 1.25 to 1.62) | 1.25 (1.25; 1.25 to 1.25) | "
        "2.00 (2.00; 2.00 to 2.00) | 2.50 | 7.0 | 1480.0 | 50% / 40% / 10% |",
        "| 1 | ReDrafter | 2.40 | 2.50 | 40.0 | 41.0 | 10% | 4,3: 75%; 0,0: 25% |",
    ]
    assert "| 1 | vLLM's n-gram, 5 tokens | 5 | 1.6 | 0.80 (" in text
    assert "1 of 5 answers loop" in text


def test_no_more_than_four_engines_are_alive(script, target, monkeypatch):
    monkeypatch.setattr(script.kinds, "has_suffix_decoding", lambda: True)
    script.main(command(target, "--prompts", "1", "--batch-sizes", "1", "--rounds", "1", "--more"))
    assert FakeEngine.most_alive == 4 and not FakeEngine.alive
    results = json.loads((target / "out" / "load.json").read_text())["results"]
    assert [list(result["variants"]) for result in results] == [
        ["plain", "redrafter", "ngram", "suffix"], ["plain", "chain", "tree"]]  # fmt: skip


def test_variants(script):
    args = script.arguments(["--out", "o", "--drafter", "d", "--more", "--variants", "redrafter",
                             "--redrafter", '{"node_budget": "fixed"}'])  # fmt: skip
    base = {"method": "redrafter", "model": "d"}
    alone = {**base, "prompt_lookup": False, "node_budget": "fixed", "draft_length": 3}
    assert script.variants(args) == {
        "redrafter": {**base, "node_budget": "fixed"},
        "chain": {**alone, "beam_width": 1, "num_speculative_tokens": 3},
        "tree": {**alone, "beam_width": 4, "num_speculative_tokens": 7},
    }


def test_the_time_is_shared_and_what_there_is_stays(script, target, monkeypatch):
    clock = [0.0]

    def generate(self, prompts, sampling, real=FakeEngine.generate):
        clock[0] += 5
        return real(self, prompts, sampling)

    monkeypatch.setattr(FakeEngine, "generate", generate)
    for module in (script, compare_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    script.main(command(target, "--prompts", "20", "--batch-sizes", "1", "2", "4", "--variants",
                        "redrafter", "--minutes", "2"))  # fmt: skip
    results = json.loads((target / "out" / "load.json").read_text())["results"]
    # 120 s: 40 for batch size 1, of which warming up takes 10 and every pair 10; then 35 of the
    # 70 that are left, and what remains.
    assert [(result["batch_size"], result["calls"]) for result in results] == [
        (1, 4), (2, 3), (4, 3)]  # fmt: skip
    assert all(len(result["variants"]) == 2 for result in results)


def test_no_time_at_all(script, target):
    with pytest.raises(SystemExit, match="raise --minutes"):
        script.main(command(target, "--minutes", "-1"))
    assert not FakeEngine.calls and not (target / "out" / "load.json").exists()


def test_random_prompts_are_sampled(script, target):
    script.main([*command(target, "--prompts", "3", "--batch-sizes", "1", "--variants", "ngram"),
                 "--set", "random"])  # fmt: skip
    report = json.loads((target / "out" / "load.json").read_text())
    settings = report["results"][0]["settings"]
    assert settings["temperature"] == 1.5 and settings["ignore_eos"]
    assert "at temperature 1.5, a seed for each prompt" in (target / "out" / "load.md").read_text()


def test_the_cache_holds_the_largest_batch(script, target):
    args = script.arguments([*command(target), "--batch-sizes", "1", "512", "--max-tokens", "700"])
    # 2 layers, 2 heads of 16, keys and values, 2 bytes each: 256 bytes a token.
    assert script.cache_bytes(args, target, [[1] * 300]) == 1 << 28
    args.batch_sizes = [1, 4096]
    assert script.cache_bytes(args, target, [[1] * 300]) == 4096 * (300 + 700 + 256) * 256
