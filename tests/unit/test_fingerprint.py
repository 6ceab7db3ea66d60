# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: what stays the same target, what is another, and what is no fingerprint."""

import json
import re

import pytest
import tiny_models
import torch

from vllm_redrafter.drafter import fingerprint
from vllm_redrafter.drafter.checkpoint import load_drafter, save_drafter
from vllm_redrafter.drafter.config import DrafterError, load_config
from vllm_redrafter.drafter.fingerprint import (
    COLUMNS,
    FIELD,
    MOST_DIFFERENCE,
    ROWS,
    Fingerprint,
    difference,
    parse,
    sample,
    sample_columns,
    sample_rows,
)

VOCAB, HIDDEN = 320, 64


def table(seed=0, rows=VOCAB):
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def of(embedding, head=None):
    """What a target with these tables is known by."""
    head = embedding if head is None else head
    return Fingerprint(
        VOCAB, HIDDEN, 2, "ab", sample(embedding, VOCAB, HIDDEN), sample(head, VOCAB, HIDDEN)
    )


@pytest.mark.parametrize("size", [1, 2, 7, 8, 16, 320, 49_152, 256_000])
def test_places_are_inside_and_reach_both_ends(size):
    for places, count in ((sample_rows(size), ROWS), (sample_columns(size), COLUMNS)):
        assert len(places) == count and places == sorted(places)
        assert places[0] == 0 and places[-1] == size - 1


def test_samples_are_values_of_the_table():
    values = torch.tensor(sample(table(), VOCAB, HIDDEN)).view(ROWS, COLUMNS)
    assert torch.equal(values, table()[sample_rows(VOCAB)][:, sample_columns(HIDDEN)])


@pytest.mark.parametrize(
    "changed",
    [
        lambda t: t,
        lambda t: t.bfloat16(),
        lambda t: t.half(),
        lambda t: torch.cat([t, torch.full((64, HIDDEN), float("nan"))]),  # padded vocabulary
        lambda t: t * 0.25,
        lambda t: t / t.norm(dim=1, keepdim=True),
        lambda t: t + 0.05 * table(seed=9),  # fine-tuned
        lambda t: (t * 4).round() / 4,  # quantised
    ],
    ids=["itself", "bfloat16", "float16", "padded", "scaled", "normed", "tuned", "quantised"],
)
def test_the_same_target(changed):
    values = sample(table(), VOCAB, HIDDEN)
    assert difference(values, sample(changed(table()), VOCAB, HIDDEN)) < MOST_DIFFERENCE / 2


def test_dtypes_make_no_difference():
    values = sample(table(), VOCAB, HIDDEN)
    assert difference(values, values) == 0
    assert difference(values, sample(table().bfloat16(), VOCAB, HIDDEN)) < 0.005


@pytest.mark.parametrize("seed", range(1, 11))
def test_another_target(seed):
    values = sample(table(), VOCAB, HIDDEN)
    for other in (table(seed), table()[torch.randperm(VOCAB)], table(seed) * 1e-3):
        assert difference(values, sample(other, VOCAB, HIDDEN)) > 1.25 * MOST_DIFFERENCE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_broken_tables_are_another_target(bad):
    values = sample(table(), VOCAB, HIDDEN)
    assert difference(values, sample(torch.full_like(table(), bad), VOCAB, HIDDEN)) == 1
    zeros = (0.0,) * (ROWS * COLUMNS)
    assert difference(zeros, zeros) == 0


def test_it_survives_config_json(tmp_path):
    made = of(table(1), table(2))
    assert parse(json.loads(json.dumps(made.to_json()))) == made
    drafter = tiny_models.random_drafter()
    save_drafter(drafter, tmp_path / "plain")
    assert load_config(tmp_path / "plain").target is None
    save_drafter(drafter, tmp_path / "known", **{FIELD: made.to_json()})
    again = load_drafter(tmp_path / "known")
    assert again.config.target == made
    # Kept by whoever writes a loaded drafter again.
    save_drafter(again, tmp_path / "again")
    assert load_config(tmp_path / "again").target == made


GOOD = of(table()).to_json()


@pytest.mark.parametrize(
    "value, problem",
    [
        ([], "is a list; it must be an object"),
        ({**GOOD, "vocab_size": "320"}, "has vocab_size '320'; it must be an integer >= 1"),
        ({**GOOD, "hidden_size": 0}, "has hidden_size 0; it must be an integer >= 1"),
        ({**GOOD, "num_hidden_layers": True}, "has num_hidden_layers True; it must be an integer"),
        ({**GOOD, "tokenizer_sha256": 3}, "has tokenizer_sha256 3; it must be a hexadecimal"),
        ({**GOOD, "embedding": "?"}, "has no 128 float32 values of the embedding in base64"),
        ({**GOOD, "head": GOOD["head"][:-4]}, "has no 128 float32 values of the head in base64"),
        ({**GOOD, "head": None}, "has no 128 float32 values of the head in base64"),
        ({**GOOD, "head": 7}, "has no 128 float32 values of the head in base64"),
        ({**GOOD, "vocab_size": 321}, "has another vocab_size than the drafter"),
        ({**GOOD, "hidden_size": 65}, "has another hidden_size than the drafter"),
    ],
    ids=str,
)
def test_what_is_no_fingerprint(tmp_path, value, problem):
    save_drafter(tiny_models.random_drafter(), tmp_path, **{FIELD: value})
    message = f"target_fingerprint {problem}"
    with pytest.raises(DrafterError, match=re.escape(message)) as raised:
        load_config(tmp_path)
    assert str(raised.value).endswith("`vllm-redrafter convert --target`.")


def test_a_later_version_is_left_alone(tmp_path):
    save_drafter(tiny_models.random_drafter(), tmp_path, **{FIELD: {"version": 2, "new": 1}})
    assert load_config(tmp_path).target is None
    assert fingerprint.parse(None) is None
