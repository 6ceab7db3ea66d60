# SPDX-License-Identifier: Apache-2.0
"""`eval --answers` with a dataset that `data` made: only its greedy answers, only its target's."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_models import write_fitted_drafter

from vllm_redrafter.cli import main
from vllm_redrafter.training.answers import Recorded, read_answers
from vllm_redrafter.training.data import Item, _totals, _write_shard
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import write_json
from vllm_redrafter.training.manifest import FORMAT, FORMAT_VERSION, MANIFEST

ITEMS = [
    Item([1, 2, 3, 4], 2, 0.0, True, 1),
    Item([5, 6, 7], 1, 0.7, True, 2),
    Item([8, 9, 10], 1, 0.0, False, 3),
]


def write(directory, items, **manifest):
    directory.mkdir()
    shards = [_write_shard(directory, number, [item], {}) for number, item in enumerate(items)]
    write_json(directory / MANIFEST, {
        "format": FORMAT, "version": FORMAT_VERSION, "target": "tiny", "vocab_size": 320,
        "shards": shards, "totals": _totals(shards), **manifest})  # fmt: skip
    return directory


def test_greedy_sequences_are_answers(tmp_path):
    directory = write(tmp_path / "d", ITEMS)
    assert read_answers(directory, 320, "any") == [
        Recorded([1, 2], [3, 4], finish_reason="stop"),
        Recorded([8], [9, 10], finish_reason="length"),
    ]


def test_datasets_that_do_not_suit(tmp_path):
    with pytest.raises(TrainingError, match="not a dataset's manifest"):
        read_answers(tmp_path, 320)
    warm = [dataclasses.replace(item, temperature=1.0) for item in ITEMS]
    with pytest.raises(TrainingError, match="no answers at temperature 0.*--temperatures 0"):
        read_answers(write(tmp_path / "warm", warm), 320)
    other = write(tmp_path / "other", ITEMS, tokenizer_sha256="theirs")
    with pytest.raises(TrainingError, match="another tokenizer"):
        read_answers(other, 320, "ours")
    with pytest.raises(TrainingError, match="vocabulary of 320, but the target has 300"):
        read_answers(other, 300)
    with pytest.raises(TrainingError, match="no answer has two tokens"):
        read_answers(write(tmp_path / "short", [Item([1, 2], 1, 0.0, True, 1)]), 320)


def test_a_dataset_gives_the_report_of_the_same_lines(tmp_path, target, data):
    drafter = write_fitted_drafter(tmp_path / "drafter", target, steps=20)
    lines = [{"prompt_token_ids": one.prompt, "token_ids": one.answer,
              "finish_reason": one.finish_reason} for one in read_answers(data, 320)]  # fmt: skip
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reports = []
    for number, answers in enumerate((data, file)):
        out = tmp_path / str(number)
        assert main(["eval", "--target", str(target), "--drafter", str(drafter), "--answers",
                     str(answers), "--settings", "2,2,4", "--out", str(out)]) == 0  # fmt: skip
        reports.append(json.loads((out / "report.json").read_text()))
        assert "ends it and is never accepted" in (out / "report.md").read_text()
    assert reports[0] == reports[1]
    assert reports[0]["groups"][0]["answers"] == 256


def test_a_drafter_is_replayed_in_the_dtype_in_which_it_is_stored(tmp_path, target):
    from tiny_models import random_drafter

    from vllm_redrafter.drafter.checkpoint import save_drafter
    from vllm_redrafter.training.evaluate import load_served
    from vllm_redrafter.training.target import Target

    save_drafter(random_drafter().bfloat16(), tmp_path / "drafter")
    frozen = Target(target, "float32", torch.device("cpu"))
    drafter = load_served(tmp_path / "drafter", frozen)
    assert drafter.dtype == torch.bfloat16 and drafter.embedding.dtype == torch.float32
