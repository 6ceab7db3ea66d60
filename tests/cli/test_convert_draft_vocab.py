# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter convert` to a smaller draft vocabulary: rows are kept bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vllm_redrafter as vr
from vllm_redrafter.cli import main
from vllm_redrafter.training.data import Item, _totals, _write_shard
from vllm_redrafter.training.manifest import FORMAT, FORMAT_VERSION, MANIFEST

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


VOCAB = json.loads((BASE / "config.json").read_text())["vocab_size"]


def write_data(directory, answers, vocab_size=VOCAB):
    """A dataset whose answers are these, behind a prompt of tokens that must not count."""
    directory.mkdir()
    items = [Item([1, 1, 1, *answer], 3, 0.0, True, n) for n, answer in enumerate(answers)]
    shards = [_write_shard(directory, 0, items, {})]
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "target": "t", "shards": shards,
                "vocab_size": vocab_size, "totals": _totals(shards)}  # fmt: skip
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory


def trim(tmp_path, size, source):
    out = tmp_path / "out"
    command = ["convert", str(BASE), str(out), "--draft-vocab-size", str(size), "--frequencies"]
    return main([*command, str(source)]), out


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_the_most_frequent_rows_are_kept(kind, tmp_path, capsys):
    answers = [[9, 9, 9, 4], [7, 4, 9, 4]]  # 9 four times, 4 three times, 7 once
    if kind == "file":
        counts = [0] * VOCAB
        for token in sum(answers, []):
            counts[token] += 1
        (source := tmp_path / "counts").write_text("".join(f"{count}\n" for count in counts))
    else:
        source = write_data(tmp_path / "data", answers)
    code, out = trim(tmp_path, 2, source)
    assert code == 0
    assert "87.5% of the counted tokens can be drafted" in capsys.readouterr().out
    drafter, full = vr.load_drafter(out), load_file(BASE / "model.safetensors")
    assert drafter.draft_vocab.tolist() == [4, 9]
    head = f"lm_head.{drafter.config.num_draft_layers}.weight"
    assert torch.equal(drafter.state_dict()[head], full[head][[4, 9]])


def test_tokens_that_never_occur_are_said(tmp_path, capsys):
    code, out = trim(tmp_path, 5, write_data(tmp_path / "data", [[9, 9, 4]]))
    said = capsys.readouterr().out
    assert code == 0 and "100.0% of the counted" in said and "3 of its 5 tokens were never" in said
    assert vr.load_drafter(out).draft_vocab.tolist() == [0, 1, 2, 4, 9]


def lines(values):
    return "".join(f"{value}\n" for value in values)


@pytest.mark.parametrize(
    "size, text, message",
    [
        (0, lines([1] * VOCAB), "--draft-vocab-size is 0; it must be at least 1 and below"),
        (VOCAB, lines([1] * VOCAB), f"below the drafter's vocabulary of {VOCAB}"),
        (2, lines([1] * 5), f"has 5 lines, but the drafter's vocabulary has {VOCAB}"),
        (2, lines([1, -3, *[1] * (VOCAB - 2)]), "line 2: -3 is not a count"),
        (2, lines([0] * VOCAB), "counts no token at all"),
        (2, "1\nx\n", "line 2: 'x' is not an integer"),
    ],
)
def test_bad_frequencies(size, text, message, tmp_path, capsys):
    (tmp_path / "counts").write_text(text)
    code, out = trim(tmp_path, size, tmp_path / "counts")
    error = capsys.readouterr().err.strip()
    assert code == 1 and message in error and "\n" not in error and not out.exists()


def test_frequencies_of_another_vocabulary(tmp_path, capsys):
    code, out = trim(tmp_path, 2, write_data(tmp_path / "data", [[4]], vocab_size=VOCAB + 1))
    assert code == 1 and "made with a vocabulary of" in capsys.readouterr().err
    code, out = trim(tmp_path, 2, tmp_path / "none")
    assert code == 1 and "cannot be read" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("given, message", [
    (["--draft-vocab-size", "2"], "need each other"),
    (["--frequencies", "f"], "need each other"),
    (["--draft-vocab", "i", "--draft-vocab-size", "2", "--frequencies", "f"], "both given"),
])  # fmt: skip
def test_options_that_do_not_go_together(given, message, tmp_path, capsys):
    assert main(["convert", str(BASE), str(tmp_path / "out"), *given]) == 1
    assert message in capsys.readouterr().err
