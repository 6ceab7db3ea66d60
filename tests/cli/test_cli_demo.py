# SPDX-License-Identifier: Apache-2.0
"""The demo's command line: which engines it compares, and its exit codes."""

import argparse
import json

import pytest

from vllm_redrafter import cli
from vllm_redrafter.bench import engines as engines_module
from vllm_redrafter.bench.engine_process import EngineFailed, Generation
from vllm_redrafter.cli import demo
from vllm_redrafter.demo import prompts as prompts_module
from vllm_redrafter.demo import target as target_module
from vllm_redrafter.demo.fetch import FetchError


def parse(*argv):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


def test_plain_and_redrafter_by_default():
    assert demo.make_variants(parse()) == {
        "plain": None,
        "redrafter": {"method": "redrafter", "model": str(demo.BUNDLED_DRAFTER)},
    }


def test_options_are_passed_on():
    variants = demo.make_variants(
        parse("--drafter", "d", "--beam-width", "8", "--draft-length", "2", "--tree", "beams",
              "--num-speculative-tokens", "7", "--top-k", "0", "--chain", "--ngram")
    )  # fmt: skip
    base = {"method": "redrafter", "model": "d", "draft_length": 2, "tree": "beams", "top_k": 0}
    assert variants["redrafter"] == {**base, "beam_width": 8, "num_speculative_tokens": 7}
    assert variants["chain"] == {**base, "beam_width": 1, "prompt_lookup": False,
                                 "node_budget": "fixed"}  # fmt: skip
    assert variants["ngram"]["method"] == "ngram"
    assert list(variants) == ["plain", "redrafter", "chain", "ngram"]


def test_lookup_and_budget_are_the_engines_own_unless_given():
    def given(*argv):
        config = demo.make_variants(parse("--drafter", "d", *argv))["redrafter"]
        return {name: value for name, value in config.items() if name not in ("method", "model")}

    assert given("--prompt-lookup") == {"prompt_lookup": True}
    assert given("--no-prompt-lookup", "--node-budget", "fixed") == {
        "prompt_lookup": False, "node_budget": "fixed"}  # fmt: skip


@pytest.mark.parametrize("argv", [["--prompts", "0"], ["--rounds", "x"], ["--tree", "oak"]])
def test_bad_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", *argv])
    assert left.value.code == 2
    assert argv[1] in capsys.readouterr().err


def test_bundled_drafter_is_small_and_has_provenance():
    files = {path.name: path for path in demo.BUNDLED_DRAFTER.iterdir()}
    assert files["model.safetensors"].stat().st_size <= 10_000_000
    config = json.loads(files["config.json"].read_text())
    assert config["model_type"] == "redrafter"
    assert "licence" in files["README.md"].read_text()


@pytest.fixture
def fake_demo(monkeypatch, tmp_path):
    """No download, no engine; `fake_demo.answers` maps (dtype, variant) to what it says."""

    class Fake:
        answers: dict = {}
        calls: list = []

        def __init__(self, name, kwargs, env):
            self.name, self.dtype = name, kwargs["dtype"]
            Fake.calls.append((self.dtype, name))

        def generate(self, prompts, sampling):
            ids = Fake.answers.get((self.dtype, self.name), [1, 2, 3])
            return Generation([ids] * len(prompts), ["ANSWER"] * len(prompts), 1.0, 0.9, 3)

        start = stop = lambda self: None
        wait_ready = peak_rss_bytes = lambda self: 1

    Fake.answers, Fake.calls = {}, []
    monkeypatch.setattr(engines_module, "EngineProcess", Fake)
    monkeypatch.setattr(target_module, "smollm2", lambda: tmp_path)
    question = prompts_module.Prompt(1, "a", ("QUESTION",))
    monkeypatch.setattr(prompts_module, "mt_bench", lambda: [question])
    monkeypatch.setattr(prompts_module, "chat_token_ids", lambda questions, target: [[5, 6]])
    return Fake


def test_demo_times_in_bfloat16_and_compares_in_float32(fake_demo, capsys, tmp_path):
    assert cli.main(["demo", "--json", str(tmp_path / "out.json")]) == 0
    assert fake_demo.calls == [("bfloat16", "plain"), ("bfloat16", "redrafter"),
                               ("float32", "plain"), ("float32", "redrafter")]  # fmt: skip
    out = capsys.readouterr().out
    for part in ("QUESTION", "ANSWER", "tokens/s", "float32: outputs equal to plain vLLM: 1 of 1"):
        assert part in out
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["settings"]["dtype"] for result in results] == ["bfloat16", "float32"]


def test_demo_fails_when_float32_differs(fake_demo, capsys):
    fake_demo.answers = {("float32", "redrafter"): [1, 2, 4]}
    assert cli.main(["demo"]) == 1
    assert "0 of 1 (0 %)" in capsys.readouterr().out


def test_differences_in_bfloat16_do_not_fail(fake_demo):
    fake_demo.answers = {("bfloat16", "redrafter"): [1, 2, 4]}
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--dtype", "bfloat16"]) == 0


def test_float32_alone_is_timed_and_judged(fake_demo):
    assert cli.main(["demo", "--dtype", "float32"]) == 0
    assert {dtype for dtype, _ in fake_demo.calls} == {"float32"}
    fake_demo.answers = {("float32", "redrafter"): [9]}
    assert cli.main(["demo", "--dtype", "float32"]) == 1


@pytest.mark.parametrize("where", ["smollm2", "engine"])
def test_failures_are_one_line(fake_demo, monkeypatch, capsys, where):
    def fail(*args, **kwargs):
        raise FetchError("no network; do this") if where == "smollm2" else EngineFailed("no; that")

    if where == "smollm2":
        monkeypatch.setattr(target_module, "smollm2", fail)
    else:
        monkeypatch.setattr(fake_demo, "wait_ready", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err.startswith("error: no")


def test_interrupt_has_its_own_code(fake_demo, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(fake_demo, "wait_ready", interrupt)
    assert cli.main(["demo"]) == 130


def test_json_into_a_missing_directory_is_said_before_anything_runs(fake_demo, tmp_path, capsys):
    assert cli.main(["demo", "--json", str(tmp_path / "no" / "out.json")]) == 1
    assert fake_demo.calls == []
    assert "there is no directory" in capsys.readouterr().err
