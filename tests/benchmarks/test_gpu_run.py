# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/run.py, rehearsed on the CPU: all stages, and going on after one that failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def modules(monkeypatch):
    """run.py and summary.py as modules."""
    monkeypatch.syspath_prepend(str(GPU))
    import run
    import summary

    return run, summary


def command(folder, *arguments):
    done = subprocess.run(
        [sys.executable, str(GPU / "run.py"), "--out", str(folder), "--rehearse", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def state_of(folder):
    return json.loads((folder / "state.json").read_text())["stages"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_of_every_stage_that_goes_on_after_a_failure(tmp_path):
    # Half a drafter of an interrupted run fails one stage; the others run.
    broken = tmp_path / "models" / "tiny-drafter"
    broken.mkdir(parents=True)
    first = ("check", "tests", "lossless", "llama-7b", "smollm2", "ops")
    code, out, err = command(tmp_path, "--minutes", "60", "--stages", *first)
    state = state_of(tmp_path)
    assert code == 1, out + err
    failed = {name for name, stage in state.items() if stage["status"] == "failed"}
    assert failed == {"llama-7b"}, state
    assert state["llama-7b"]["why"].startswith("remove what an interrupted run left: ")
    text = (tmp_path / "gpu_run.md").read_text()
    assert "break-even acceptance, 7B, batch 1 | at most 0.6 |  | not run" in text

    broken.rmdir()
    # llama-3-8b is llama-7b with other shapes, which a rehearsal makes tiny.
    code, out, err = command(tmp_path, "--minutes", "60", "--stages", *first)
    assert code == 0, out + err
    assert [line for line in out.splitlines() if line.endswith(": done already")] == [
        f"{name}: done already" for name in first if name != "llama-7b"
    ]

    whole = json.loads((tmp_path / "gpu_run.json").read_text())
    assert whole["results"].pop("llama-3-8b") == "not run"
    assert set(whole["results"]) == set(whole["stages"]) == set(first)
    rows = whole["results"]["llama-7b"]["rows"]
    assert {(row["mode"], row["batch"]) for row in rows} == {
        (mode, batch) for mode in ("plain", "chain", "tree") for batch in (1, 2)
    }
    for row in rows:
        assert "not_run" not in row, row
        parts = ("verify", "sample", "move", "draft")
        ran = [name for name in parts if row[name] > 0]
        assert ran == (["verify", "sample"] if row["mode"] == "plain" else list(parts))
        assert row["step"] > sum(row[name] for name in parts) * 0.5
        if row["mode"] == "tree":
            assert row["accepted"] > 0.5 and row["moves_per_step"] > 0
        if row["mode"] == "chain":
            assert row["accepted"] > 0.3 and row["moves_per_step"] == 0
    exact = whole["results"]["lossless"]["float32"]["redrafter"]
    assert exact["equal"] == exact["total"] > 0
    assert whole["results"]["smollm2"]["2"]["tree"]["ratio"]["median"] > 0
    assert whole["results"]["tests"]["passed"] > 0
    assert whole["results"]["ops"]["walk"]["rows"]
    text = (tmp_path / "gpu_run.md").read_text()
    assert "Synthetic acceptance, dummy weights" in text and "figures mean nothing" in text
    assert "break-even acceptance, 7B, batch 1 | at most 0.6 | " in text and "| rehearsed |" in text
    assert (tmp_path / "gpu_run.png").stat().st_size > 10_000


def test_without_time_nothing_is_started(modules, tmp_path, monkeypatch):
    run, _ = modules
    monkeypatch.setattr(run, "describe", lambda args, env: {"device": "CPU (rehearsal)"})
    assert run.main(["--out", str(tmp_path), "--rehearse", "--minutes", "0"]) == 1
    assert {stage["status"] for stage in state_of(tmp_path).values()} == {"not run"}
    text = (tmp_path / "gpu_run.md").read_text()
    assert text.count("not run: the time was up; run it again") == len(run.STAGES)
    assert text.count("| not run |") == 4


def test_a_stage_that_hangs_is_killed_and_other_results_stay(modules, tmp_path, monkeypatch):
    run, _ = modules
    (tmp_path / "check.json").write_text("{}")
    args = run.parse(["--out", str(tmp_path), "--rehearse"])
    context = run.Context(tmp_path, True, (4, 3, 7), 1.5)
    sleeper = tmp_path / "run.py"
    sleeper.write_text("import time\ntime.sleep(600)")
    monkeypatch.setattr(run, "HERE", tmp_path)
    stage = run.start("tests", 1.0, args, context, {})
    assert stage["status"] == "failed" and stage["why"].startswith("cut short after ")


@pytest.mark.parametrize("device, rehearse", [("", []), ("", ["--rehearse"]), ("H100", [])])
def test_a_gpu_is_required_without_rehearsal(modules, tmp_path, monkeypatch, device, rehearse):
    run, _ = modules
    said = subprocess.CompletedProcess([], 0, json.dumps({"device": device}), "")
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **kwargs: said)
    args = run.parse(["--out", str(tmp_path), *rehearse])
    if device or rehearse:
        assert run.describe(args, {})["device"] == (device or "CPU (rehearsal)")
    else:
        with pytest.raises(SystemExit, match="--rehearse runs tiny models on the CPU"):
            run.describe(args, {})


def test_other_versions_make_old_results_void(modules, tmp_path):
    run, _ = modules
    here = {"device": "one", "vllm": "0.33.0"}
    run.save_state(tmp_path, {"environment": here, "stages": {"check": {"status": "done"}}})
    assert run.load_state(tmp_path, here)["stages"]
    assert not run.load_state(tmp_path, {**here, "vllm": "0.32.0"})["stages"]


def row(mode, step, **parts):
    base = {"verify": step, "sample": 0.0, "move": 0.0, "draft": 0.0, "decision": 0.0}
    return {"mode": mode, "batch": 1, "context": 2048, "step": step, **base, **parts}


@pytest.mark.parametrize(
    "tree, verdicts",
    [
        (row("tree", 6.0, verify=5.0, sample=0.3, draft=0.2, move=0.1), ["met"] * 4),
        (row("tree", 9.0, verify=7.0, sample=0.5, draft=1.0, move=0.2), ["MISSED"] * 4),
    ],
)
def test_targets(modules, tree, verdicts):
    _, summary = modules
    plain = row("plain", 5.0, verify=4.5, sample=0.3)
    aims = summary.targets({"llama-7b": {"rows": [plain, tree]}})
    assert [aim.verdict for aim in aims] == verdicts
    assert aims[2].value == pytest.approx(tree["step"] / 5.0 - 1)
    # Synthetic decisions are not counted as ours.
    slow = {**tree, "sample": tree["sample"] + 1.0, "decision": 1.0}
    again = summary.targets({"llama-7b": {"rows": [plain, slow]}})
    assert again[0].value == pytest.approx(aims[0].value)
    assert {aim.verdict for aim in summary.targets({})} == {"not run"}
