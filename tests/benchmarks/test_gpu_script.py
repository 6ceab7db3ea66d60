# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/ops.py, rehearsed on the CPU: every stage, its files and its wording."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("gpu/ops.py", "gpu_ops_benchmark")


@pytest.fixture(scope="module")
def rehearsal(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    script.main(["--out", str(folder), "--rehearse"])
    return folder


def rows(folder: Path, stage: str) -> list[dict]:
    return json.loads((folder / f"{stage}.json").read_text())["rows"]


def test_every_stage_has_rows_and_targets(script, rehearsal):
    whole = json.loads((rehearsal / "ops_gpu.json").read_text())
    assert list(whole) == list(script.STAGES)
    for stage, (other, most) in script.TARGETS.items():
        assert rows(rehearsal, stage)
        for row in rows(rehearsal, stage):
            times, target = row["us"], row["target"]
            assert times["ours"] > 0 and times["twin"] > 0
            value = times["ours"] if other == "us" else times["ours"] / times[other]
            assert target == {"of": other, "most": most, "value": value, "met": value <= most}


def test_attention_has_all_columns(rehearsal):
    for row in rows(rehearsal, "tree_attention"):
        assert set(row["us"]) == {"ours", "twin", "floor", "flash", "xformers"}
        assert row["us"]["flash"] > 0
        # Absent, or there and for GPUs only.
        assert row["us"]["xformers"] == "not installed" or row["us"]["xformers"][:6] == "failed"


def test_the_report(script, rehearsal):
    text = (rehearsal / "ops_gpu.md").read_text()
    assert "CPU (rehearsal)" in text and "Target: at most 1.3 x flash." in text
    for stage in script.STAGES:
        assert f"## {stage}" in text
    assert text.count("| tiny | ") == sum(
        len(rows(rehearsal, stage)) for stage in ("draft", "tree_attention", "move_kv")
    )


def test_stages_resume_and_absent_ones_are_not_run(script, tmp_path, capsys):
    script.main(["--out", str(tmp_path), "--rehearse", "--stages", "walk"])
    assert (
        "## draft\n\nTarget: at most 1.3 x floor.\n\nnot run\n"
        in (tmp_path / "ops_gpu.md").read_text()
    )
    before = (tmp_path / "walk.json").read_text()
    capsys.readouterr()
    script.main(["--out", str(tmp_path), "--rehearse", "--stages", "walk", "build_tree"])
    assert "walk: done already" in capsys.readouterr().out
    assert (tmp_path / "walk.json").read_text() == before
    assert (tmp_path / "build_tree.json").is_file()
    script.main(["--out", str(tmp_path), "--rehearse", "--stages", "walk", "--again"])
    assert "walk: done already" not in capsys.readouterr().out


def test_what_does_not_fit_says_so(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.Run, "free_bytes", lambda self: 1024)
    script.main(["--out", str(tmp_path), "--rehearse", "--stages", "draft", "tree_attention"])
    for stage in ("draft", "tree_attention"):
        for row in rows(tmp_path, stage):
            assert row["us"]["ours"].startswith("not run: ")
            assert "fit memory" in row["us"]["ours"]
            assert row["target"]["met"] == "not run"


def test_a_gpu_is_required_without_rehearsal(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path)])
    assert "--rehearse" in capsys.readouterr().err
