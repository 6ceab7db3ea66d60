# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter convert --draft-vocab`: rows of the head are kept bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vllm_redrafter as vr
from vllm_redrafter.cli import main

BASE = Path(__file__).resolve().parents[1] / "conformance" / "base"


def run(tmp_path, text):
    (tmp_path / "ids").write_text(text)
    out = tmp_path / "out"
    return main(["convert", str(BASE), str(out), "--draft-vocab", str(tmp_path / "ids")]), out


def test_rows_are_the_full_heads(tmp_path):
    code, out = run(tmp_path, "7\n3\n11\n")
    assert code == 0
    drafter, full = vr.load_drafter(out), load_file(BASE / "model.safetensors")
    assert drafter.draft_vocab.tolist() == [7, 3, 11]
    head = f"lm_head.{drafter.config.num_draft_layers}.weight"
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, full[name][[7, 3, 11]] if name == head else full[name])


@pytest.mark.parametrize(
    "text, message",
    [("1\nx\n", "line 2"), ("1\n1\n", "distinct"), ("", "distinct"), ("99999999\n", "from 0 to")],
)
def test_bad_ids(text, message, tmp_path, capsys):
    code, out = run(tmp_path, text)
    error = capsys.readouterr().err.strip()
    assert code == 1 and message in error and "\n" not in error and not out.exists()
