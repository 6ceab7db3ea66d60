# SPDX-License-Identifier: Apache-2.0
"""Defaults of `train` follow the target's size; what is given wins, and what ran is on record."""

from __future__ import annotations

import json

import pytest

from vllm_redrafter.training.defaults import Recipe, recipe, resolve
from vllm_redrafter.training.options import TrainOptions
from vllm_redrafter.training.train import train


def test_larger_targets_get_larger_batches_and_vocabularies():
    recipes = [recipe(hidden) for hidden in (576, 1023, 1024, 3071, 3072, 8192)]
    assert [r.batch_size for r in recipes] == [320, 320, 512, 512, 1024, 1024]
    assert [r.draft_vocab_size for r in recipes] == [8192, 8192, 16384, 16384, 32768, 32768]


@pytest.mark.parametrize("given, vocab, expected", [
    ({}, 49152, recipe(576)),
    ({}, 320, Recipe(320, 1e-3, 2, 320)),
    ({"blocks": 0, "lr": 3e-3, "batch_size": 7, "draft_vocab_size": 99}, 320,
     Recipe(7, 3e-3, 0, 99)),
])  # fmt: skip
def test_what_is_given_wins(given, vocab, expected):
    options = TrainOptions("t", "d", "o", **given)
    assert resolve(options, 576, vocab) == expected


def test_a_run_records_what_it_took(tmp_path, target, data):
    out = tmp_path / "out"
    train(TrainOptions(str(target), str(data), str(out), max_steps=1, group_tokens=2048,
                       held_out=0, plot=False))  # fmt: skip
    record = json.loads((out / "training" / "options.json").read_text())
    assert {name: record[name] for name in ("batch_size", "lr", "blocks", "draft_vocab_size")} == {
        "batch_size": 320, "lr": 1e-3, "blocks": 2, "draft_vocab_size": 320}  # fmt: skip
    assert json.loads((out / "config.json").read_text())["num_draft_layers"] == 2
