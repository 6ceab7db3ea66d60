# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter bench` with engines faked: batches, what is alive when, time, and its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vllm_redrafter import cli
from vllm_redrafter.bench import batches as batches_module
from vllm_redrafter.bench import compare as compare_module
from vllm_redrafter.bench import engines as engines_module
from vllm_redrafter.bench import prompts as prompts_module
from vllm_redrafter.bench import rates as rates_module
from vllm_redrafter.bench import run as run_module
from vllm_redrafter.bench import variants as kinds
from vllm_redrafter.bench.engine_process import EngineFailed, Generation, SpecCounters
from vllm_redrafter.bench.errors import BenchError
from vllm_redrafter.bench.prompts import PromptSet, that_fit
from vllm_redrafter.bench.run import BenchOptions, all_variants, bench, chosen_servers

LOOP = [1, 2] * 20


class FakeEngine:
    """Two tokens a second in plain vLLM, more in others; the first prompt's answer loops."""

    alive: set[str] = set()
    most_alive = 0
    calls: list[tuple[str, int]] = []
    kwargs: list[dict] = []

    def __init__(self, name, kwargs, env):
        self.name = name
        FakeEngine.kwargs.append(kwargs)

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
        own, spec, parts = {}, SpecCounters(), {}
        if self.name == "redrafter":
            spec = SpecCounters(10, 70, 15, (10, 5))
            parts = {"draft": 0.1, "walk": 0.05}
            own = {"accepted_by_source": {"drafter": 5, "lookup": 4, "both": 1},
                   "draft_shapes": {"4,3": 3, "0,0": 1},
                   "sums": {"drafts": 10, "acceptance_length": 25, "predicted_acceptance": 24,
                            "timed_steps": 10, "predicted_step_ms": 400, "real_step_ms": 410,
                            "steps": 9, "steps_without_nodes": 1},
                   }  # fmt: skip
        count = len(ids)
        return Generation(ids, [""] * count, seconds, seconds, 11, spec, own=own,
                          part_seconds=parts, first_seconds=[0.5] * count,
                          later_seconds=[seconds - 0.5] * count)  # fmt: skip


class FakeTokens:
    """A chat template that leaves nothing of the prompt but its number."""

    def __init__(self, directory, raw):
        self.count = -1

    def encode(self, conversation):
        self.count += 1
        return [self.count, 1, 1]


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    FakeEngine.alive, FakeEngine.most_alive, FakeEngine.calls = set(), 0, []
    FakeEngine.kwargs = []
    monkeypatch.setattr(engines_module, "EngineProcess", FakeEngine)
    monkeypatch.setattr(prompts_module, "ChatTokens", FakeTokens)
    monkeypatch.setattr(run_module, "available_bytes", lambda: 1 << 50)
    # Drawing takes seconds: one test does.
    monkeypatch.setattr(run_module, "can_plot", lambda: False)


@pytest.fixture
def target(tmp_path) -> Path:
    """All that is read of it."""
    (tmp_path / "a-target").mkdir()
    (tmp_path / "a-target" / "config.json").write_text(json.dumps({
        "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64,
        "num_key_value_heads": 2}))  # fmt: skip
    return tmp_path / "a-target"


def command(target: Path, *argv: str) -> list[str]:
    return ["bench", str(target), str(kinds.BUNDLED_DRAFTER), "--sets", "quoting", "--rounds", "1",
            "--out", str(target / "out"), *argv]  # fmt: skip


def read(target: Path) -> dict:
    return json.loads((target / "out" / "bench.json").read_text())


def test_every_batch_size_on_running_engines(target, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "can_plot", lambda: True)
    assert cli.main(command(target, "--count", "5", "--batch-sizes", "1", "2", "8", "--variants",
                            "redrafter", "ngram")) == 0  # fmt: skip
    mine = [size for name, size in FakeEngine.calls if name == "redrafter"]
    assert mine == [1, 1, 1, 1, 1, 2, 2, 8]  # full batches only; 5 prompts fill one of 8
    assert sorted(FakeEngine.calls[:3]) == [("ngram", 1), ("plain", 1), ("redrafter", 1)]
    assert FakeEngine.most_alive == 3 and not FakeEngine.alive
    # vLLM refuses these counters for an engine without drafts.
    assert ["per_request_spec_decode_metrics" in kwargs for kwargs in FakeEngine.kwargs] == [
        "speculative_config" in kwargs for kwargs in FakeEngine.kwargs]  # fmt: skip

    report = read(target)
    assert [result["batch_size"] for result in report["results"]] == [1, 2, 8]
    first = report["results"][0]
    assert (first["groups"], first["looping_groups"], first["calls"]) == (5, 1, 5)
    ours = first["variants"]["redrafter"]
    assert ours["looping"]["ratio"]["overall"] == pytest.approx(2)
    assert ours["not looping"]["ratio"]["overall"] == pytest.approx(1.25)
    assert ours["all"]["ratio"]["overall"] == pytest.approx(100 / 74)
    assert "looping" not in report["results"][1]["variants"]["redrafter"]
    assert first["variants"]["ngram"]["all"]["ratio"]["overall"] == pytest.approx(0.8)
    assert "token_ids" not in json.dumps(report)

    text = (target / "out" / "bench.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 1 | ReDrafter |")]
    assert rows == [
        "| 1 | ReDrafter | 5 | 2.7 | 1.35 (1.25; 1.25 to 1.62) | 1.25 (1.25; 1.25 to 1.25) | "
        "2.00 (2.00; 2.00 to 2.00) | 500 (500 to 500) | 397.4 (320.5 to 397.4) | 2.50 | 1.00 0.50 "
        "| 7.0 | 1480.0 | 50% / 40% / 10% |",
        "| 1 | ReDrafter | 2.40 | 2.50 | 40.0 | 41.0 | 10% | 4,3: 75%; 0,0: 25% |",
    ]
    assert "| 1 | vLLM's n-gram, 5 tokens | 5 | 1.6 | 0.80 (" in text
    assert "1 of 5 answers loop" in text
    pictures = {path.name for path in (target / "out").glob("*.png")}
    assert pictures == {"speed_up.png", "acceptance.png", "step_time.png", "latency.png"}
    assert all(f"({name})" in text for name in pictures)

    out = capsys.readouterr().out
    assert report["recommendation"]["variant"] == "redrafter"
    config = f'{{"method": "redrafter", "model": "{kinds.BUNDLED_DRAFTER}"}}'
    assert f"vllm serve {target} --speculative-config '{config}'" in out and "left)" in out


def test_no_path_of_an_installation_is_reported(target):
    report = bench(BenchOptions(str(target), target / "out", sets=("quoting",), count=1, rounds=1,
                                batch_sizes=(1,)), lambda *news: None)  # fmt: skip
    text = (target / "out" / "bench.json").read_text() + (target / "out" / "bench.md").read_text()
    assert str(target) not in text and str(kinds.BUNDLED_DRAFTER) not in text
    assert read(target)["variants"]["redrafter"]["model"] == "redrafter-smollm2-135m"
    # What is returned is to be pasted here.
    assert str(kinds.BUNDLED_DRAFTER) in report["recommendation"]["flag"]


def test_starts_count_in_the_time_that_is_left(target, monkeypatch):
    """Two engines of 100 s each are up when the first call of 5 s runs, and two are to come."""
    clock, left = [0.0], []

    def spend(seconds, result):
        clock[0] += seconds
        return result

    real = FakeEngine.generate
    monkeypatch.setattr(FakeEngine, "wait_ready", lambda self: spend(100, 1.0))
    monkeypatch.setattr(FakeEngine, "generate", lambda *args: spend(5, real(*args)))
    for module in (batches_module, compare_module, run_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    options = BenchOptions(
        str(target), target / "out", sets=("quoting",), count=2, rounds=1, batch_sizes=(1,),
        variants=("redrafter", "ngram"), at_once=2,
    )  # fmt: skip
    run = run_module._Bench(options, lambda *news: left.append(news[1:]))
    run.work.clock = lambda: clock[0]
    run.run()
    first = next(news for news in left if news[0] == 1)
    assert first == (1, 8, "about 4 min left")  # 7 calls of 5 s, and 200 s


def test_no_more_engines_than_fit(target):
    cli.main(command(target, "--count", "1", "--batch-sizes", "1", "--at-once", "3"))
    assert FakeEngine.most_alive == 3 and not FakeEngine.alive
    parts = [list(result["variants"]) for result in read(target)["results"]]
    wanted = kinds.default_variants()
    assert parts == [["plain", *wanted[at : at + 2]] for at in range(0, len(wanted), 2)]


def test_queued_requests_are_held_back_by_the_engine(target):
    cli.main(command(target, "--count", "5", "--batch-sizes", "1", "2", "--queue", "--variants",
                     "redrafter"))  # fmt: skip
    assert [size for name, size in FakeEngine.calls if name == "redrafter"] == [1] * 5 + [5]
    assert [kwargs["max_num_seqs"] for kwargs in FakeEngine.kwargs] == [1, 1, 2, 2]
    assert [result["batch_size"] for result in read(target)["results"]] == [1, 2]
    assert "of which so many ran at a time" in (target / "out" / "bench.md").read_text()


def test_variants():
    options = BenchOptions("t", Path("o"), "d", variants=("redrafter", "chain", "beams"),
                           settings=("4,3,7",), redrafter={"top_k": 5, "node_budget": "fixed"},
                           also={"mine": {"method": "eagle"}})  # fmt: skip
    base = {"method": "redrafter", "model": "d"}
    fixed = {**base, "node_budget": "fixed"}
    assert all_variants(options) == {
        "redrafter": {**fixed, "top_k": 5},
        "chain": {**fixed, "beam_width": 1, "prompt_lookup": False},
        "beams": {**base, "tree": "beams"},
        "4,3,7": {**fixed, "beam_width": 4, "draft_length": 3, "num_speculative_tokens": 7,
                  "top_k": 5},
        "mine": {"method": "eagle"},
    }  # fmt: skip


@pytest.mark.parametrize(("changed", "says"), [
    ({"variants": ("oak",)}, "--variants has 'oak'; give some of redrafter"),
    ({"also": {"chain": {}}}, "--also has 'chain', which is the name of a variant"),
    ({"variants": ()}, "nothing to compare"),
])  # fmt: skip
def test_variants_that_are_none(changed, says):
    with pytest.raises(BenchError, match=says):
        all_variants(BenchOptions("t", Path("o"), **changed))


def test_servers():
    options = BenchOptions("t", Path("o"), servers=("plain", "chain"), rates=(1.0,))
    assert chosen_servers(options, {"chain": {"a": 1}}) == {"plain": None, "chain": {"a": 1}}
    with pytest.raises(BenchError, match="--servers has 'chain', which is not measured here"):
        chosen_servers(options, {"redrafter": {}})


def test_rates_come_last(target, monkeypatch):
    asked = []

    def measured(what, end, report):
        assert not FakeEngine.alive, "servers and engines must not share the machine"
        asked.append((what.rates, list(what.variants), what.settings.rounds))
        runs = {name: [rates_module.figures([rates_module.Answer(0, 1, last, 11)])]
                for name, last in (("plain", 3.0), ("redrafter", 2.0))}  # fmt: skip
        yield {"rate": 2.0, **rates_module.compare_rate(runs), "runs": runs}

    monkeypatch.setattr(rates_module, "measure_rates", measured)
    assert cli.main(command(target, "--count", "1", "--batch-sizes", "1", "--rates", "2",
                            "--variants", "redrafter")) == 0  # fmt: skip
    assert asked == [((2.0,), ["plain", "redrafter"], 1)]
    report = read(target)
    assert report["rates"][0]["servers"]["redrafter"]["ratios"]["tpot_p50_ms"]["median"] == 0.5
    # Twice as fast alone on a looping answer, and at 2 requests/s.
    assert report["recommendation"]["scores"]["redrafter"] == pytest.approx(2.0)
    assert "Behind `vllm serve`, quoting" in (target / "out" / "bench.md").read_text()


def test_the_time_is_shared_and_what_there_is_stays(target, monkeypatch):
    clock = [0.0]

    def generate(self, prompts, sampling, real=FakeEngine.generate):
        clock[0] += 5
        return real(self, prompts, sampling)

    monkeypatch.setattr(FakeEngine, "generate", generate)
    for module in (batches_module, compare_module, run_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    cli.main(command(target, "--count", "20", "--batch-sizes", "1", "2", "4", "--variants",
                     "redrafter", "--rounds", "2", "--minutes", "2"))  # fmt: skip
    # 120 s: 40 for batch size 1, of which warming up takes 10 and every pair 10; then 35 of the
    # 70 that are left, and what remains.
    assert [(result["batch_size"], result["calls"]) for result in read(target)["results"]] == [
        (1, 4), (2, 3), (4, 3)]  # fmt: skip


def test_no_time_at_all(target, capsys):
    assert cli.main(command(target, "--minutes", "-1")) == 1
    assert "raise --minutes" in capsys.readouterr().err
    assert not FakeEngine.calls and not (target / "out" / "bench.json").exists()


def test_random_prompts_are_sampled(target):
    cli.main([*command(target, "--count", "3", "--batch-sizes", "1", "--variants", "ngram"),
              "--sets", "quoting", "random"])  # fmt: skip
    report = read(target)
    settings = {result["set"]: result["settings"] for result in report["results"]}
    assert settings["random"]["temperature"] == 1.5 and settings["random"]["ignore_eos"]
    assert settings["quoting"]["temperature"] == 0 and not settings["quoting"]["ignore_eos"]
    text = (target / "out" / "bench.md").read_text()
    assert "greedy (random: at temperature 1.5, a seed for each prompt)" in text
    assert "| quoting | 1 | plain vLLM |" in text and "| random | 1 | plain vLLM |" in text


def test_prompts_of_a_file(target, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a"}\nnonsense\n{"prompt": "b"}\n')
    cli.main(command(target, "--prompts", str(tmp_path / "mine.jsonl"), "--batch-sizes", "1",
                     "--variants", "ngram"))  # fmt: skip
    report = read(target)
    assert report["sets"] == {"mine": {"count": 2, "longest": 3}}
    assert "mine.jsonl, line 2: not JSON" in report["remarks"][0]


def test_prompts_that_are_too_long_are_left_out():
    asked = PromptSet("s", [[1] * 30, [1] * 41], ["a", "b"])
    kept = that_fit(asked, 60, 100)
    assert (kept.token_ids, kept.categories) == ([[1] * 30], ["a"])
    assert kept.remarks[0].startswith("1 prompts of s were left out")
    assert that_fit(asked, 60, None) is asked and that_fit(asked, 59, 100) is asked
    with pytest.raises(BenchError, match="no prompt of s fits with an answer of 80 tokens"):
        that_fit(asked, 80, 100)


def test_no_engine_is_longer_than_the_target(target):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    cli.main(command(target, "--count", "1", "--batch-sizes", "1", "--variants", "ngram"))
    assert {kwargs["max_model_len"] for kwargs in FakeEngine.kwargs} == {512}


def test_an_interruption_keeps_what_was_measured(target, monkeypatch, capsys):
    def generate(self, prompts, sampling, real=FakeEngine.generate):
        if len(prompts) == 2:
            raise KeyboardInterrupt
        return real(self, prompts, sampling)

    monkeypatch.setattr(FakeEngine, "generate", generate)
    assert cli.main(command(target, "--count", "2", "--batch-sizes", "1", "2")) == 130
    assert [result["batch_size"] for result in read(target)["results"]] == [1]
    assert "interrupted; what was measured is in" in capsys.readouterr().out
    assert not FakeEngine.alive


@pytest.mark.parametrize(("argv", "says"), [
    (["nothere", "d"], "the target 'nothere' does not exist"),
    (["TARGET", "nothere"], "nothere"),
    (["TARGET"], "DRAFTER is missing"),
    (["TARGET", "DRAFTER", "--prompts", "nothere"], "--prompts nothere cannot be read"),
    (["TARGET", "DRAFTER", "--at-once", "1"], "--at-once is 1"),
    (["TARGET", "DRAFTER", "--also", "x={}", "--also", "x={}"], "names one variant twice"),
    (["TARGET", "DRAFTER", "--settings", "4,3"], "a setting is W,L,N"),
])  # fmt: skip
def test_one_sentence_before_anything_runs(target, capsys, argv, says):
    names = {"TARGET": str(target), "DRAFTER": str(kinds.BUNDLED_DRAFTER)}
    out = ["--out", str(target / "out")]
    assert cli.main(["bench", *(names.get(one, one) for one in argv), *out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert not FakeEngine.kwargs


@pytest.mark.parametrize("argv", [["--redrafter", "[]"], ["--also", "x"], ["--rates", "0"],
                                  ["--variants", "oak"], ["--batch-sizes", "0"]])  # fmt: skip
def test_bad_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", *argv])
    assert left.value.code == 2 and argv[1] in capsys.readouterr().err


def test_an_engine_that_fails_is_one_sentence(target, monkeypatch, capsys):
    def fail(self):
        raise EngineFailed("engine 'plain': no memory")

    monkeypatch.setattr(FakeEngine, "wait_ready", fail)
    assert cli.main(command(target)) == 1
    assert capsys.readouterr().err == "error: engine 'plain': no memory\n"


def test_another_method_that_does_not_start_is_left_out(target, monkeypatch):
    def ready(self):
        if self.name in failing:
            raise EngineFailed(f"engine {self.name!r}: not here")
        return 1.0

    failing = {"ngram"}
    monkeypatch.setattr(FakeEngine, "wait_ready", ready)
    argv = command(target, "--count", "1", "--batch-sizes", "1", "--at-once", "2", "--variants")
    assert cli.main([*argv, "ngram", "redrafter"]) == 0
    assert [list(result["variants"]) for result in read(target)["results"]] == [
        ["plain", "redrafter"]]  # fmt: skip
    assert read(target)["remarks"] == [
        "vLLM's n-gram, 5 tokens was left out, because it does not start: engine 'ngram': not here"
    ]
    assert "was left out" in (target / "out" / "bench.md").read_text() and not FakeEngine.alive
    failing.add("redrafter")  # what the command is for is not left out
    assert cli.main([*argv, "ngram", "redrafter"]) == 1 and not FakeEngine.alive


def test_a_package_that_is_missing_is_one_sentence(target, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "vllm_redrafter.bench.rates")
    monkeypatch.delitem(sys.modules, "vllm_redrafter.bench.server", raising=False)
    assert cli.main(command(target, "--rates", "1")) == 1
    err = capsys.readouterr().err
    assert err == "error: bench needs the package `aiohttp`: run `vllm-redrafter doctor`.\n"
    assert not FakeEngine.kwargs


def test_without_matplotlib_there_are_no_pictures(target, monkeypatch, capsys):
    from vllm_redrafter.training import log

    (target / "out").mkdir()
    (target / "out" / "latency.png").write_bytes(b"of an older run")
    monkeypatch.setattr(log, "can_plot", lambda: False)
    assert cli.main(command(target, "--count", "1", "--batch-sizes", "1")) == 0
    assert "no pictures: they need `matplotlib`" in capsys.readouterr().out
    assert not list((target / "out").glob("*.png"))
    assert "png" not in (target / "out" / "bench.md").read_text()
