# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter convert --to apple`: back and forth without a changed bit, or a refusal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vllm_redrafter as vr
from vllm_redrafter.cli import main

TESTS = Path(__file__).resolve().parents[1]
CASES = sorted(path.parent for path in (TESTS / "conformance").glob("*/oracle.npz"))
BUNDLED = TESTS.parent / "vllm_redrafter" / "drafters" / "redrafter-smollm2-135m"


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_there_and_back(case, tmp_path):
    ours, apple = tmp_path / "ours", tmp_path / "apple"
    assert main(["convert", str(case), str(ours)]) == 0
    assert main(["convert", str(ours), str(apple), "--to", "apple"]) == 0
    before, after = load_file(case / "model.safetensors"), load_file(apple / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
    config = vr.load_drafter(apple).config
    assert config.apple and config == vr.load_drafter(case).config


@pytest.mark.parametrize("shared", [True, False])
def test_what_apples_format_cannot_store(shared, tmp_path, capsys):
    src = BUNDLED
    if not shared:
        src = tmp_path / "src"
        assert main(["convert", str(CASES[0]), str(src)]) == 0
        config = json.loads((src / "config.json").read_text())
        tensors = load_file(src / "model.safetensors")
        head = f"lm_head.{config['num_draft_layers']}.weight"
        tensors |= {head: tensors[head][:10], "draft_vocab": torch.arange(10)}
        (src / "model.safetensors").unlink()
        torch.save(tensors, src / "model.pt")
        (src / "config.json").write_text(json.dumps(config | {"draft_vocab_size": 10}))
    capsys.readouterr()
    dst = tmp_path / "apple"
    assert main(["convert", str(src), str(dst), "--to", "apple"]) == 1
    text = capsys.readouterr().err.strip()
    assert ("shares its output head" if shared else "a draft vocabulary of 10 ids") in text
    assert text.startswith("error: ") and "\n" not in text and not dst.exists()


def test_what_is_lost_is_said(tmp_path, capsys):
    ours = tmp_path / "ours"
    assert main(["convert", str(CASES[0]), str(ours)]) == 0
    assert main(["convert", str(ours), str(tmp_path / "same"), "--to", "apple"]) == 0
    assert "note:" not in capsys.readouterr().out  # top_k 50, as Apple's readers have it
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"top_k": 7, "beam_width": 3}))
    assert main(["convert", str(ours), str(tmp_path / "apple"), "--to", "apple"]) == 0
    out = capsys.readouterr().out
    assert "no place for top_k 7, beam_width 3" in out or "beam_width 3, top_k 7" in out
