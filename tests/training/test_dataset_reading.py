# SPDX-License-Identifier: Apache-2.0
"""Reading datasets: our shards, speculators' hidden states, and everything that does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import greedy_rollouts, write_llama
from training_cases import write_dataset

from vllm_redrafter.training.batches import make_group, num_anchors, pack, split
from vllm_redrafter.training.dataset import MANIFEST, Dataset, check_fits, join, load_dataset
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.options import TrainOptions
from vllm_redrafter.training.target import (
    Target,
    check_stored_states,
    padded_groups,
    with_finished_states,
)
from vllm_redrafter.training.train import train
from vllm_redrafter.training.vocabulary import choose


def test_shards_come_back_as_they_were(tmp_path):
    texts = torch.randint(256, (5, 9))
    dataset = load_dataset(write_dataset(tmp_path / "d", texts, prompt=3), max_length=7)
    assert len(dataset) == 5
    assert torch.equal(torch.stack(dataset.tokens).long(), texts[:, :7])
    assert dataset.answer[0].tolist() == [False] * 3 + [True] * 4


def test_a_changed_shard_is_found(tmp_path):
    directory = write_dataset(tmp_path / "d", torch.randint(256, (5, 9)))
    path = directory / "data-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TrainingError, match="data-00001.safetensors.*sha256 differs"):
        load_dataset(directory)


def test_directories_that_are_no_datasets(tmp_path):
    with pytest.raises(TrainingError, match="does not exist.*vllm-redrafter data"):
        load_dataset(tmp_path / "none")
    with pytest.raises(TrainingError, match="neither manifest.json nor hs_"):
        load_dataset(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(TrainingError, match="not a dataset's manifest"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    "manifest, vocab, tokenizer, message",
    [
        ({"tokenizer_sha256": "a", "target": "other"}, 300, "b", "another tokenizer.*'other'"),
        ({"vocab_size": 299}, 300, None, "vocabulary of 299, but the target has 300"),
        ({}, 200, None, "token 255, but the target's vocabulary has 200"),
    ],
)
def test_data_of_another_target_is_refused(manifest, vocab, tokenizer, message):
    dataset = Dataset([torch.tensor([1, 255])], [torch.tensor([True, True])], manifest)
    with pytest.raises(TrainingError, match=message):
        check_fits(dataset, vocab, tokenizer, "d")


def write_hidden_states(directory, target, *, normed=True, mask=False):
    """Files as speculators writes them: three slots, of which the last is the last layer's."""
    directory.mkdir()
    texts, hidden = greedy_rollouts(target, rows=3, length=12)
    if not normed:
        # The tiny target's norm has weight 1: any multiple of its output is an input of it.
        hidden = hidden * 2.5
    for i in (0, 2, 10):
        states = torch.stack([torch.zeros_like(hidden[0]), torch.ones_like(hidden[0]),
                              hidden[i % 3]], 1)  # fmt: skip
        tensors = {"token_ids": texts[i % 3], "hidden_states": states.contiguous()}
        if mask:
            tensors["loss_mask"] = torch.arange(12) >= 6
        save_file(tensors, directory / f"hs_{i}.safetensors")
    return texts, hidden


@pytest.mark.parametrize("normed", [True, False])
def test_hidden_state_files(tmp_path, target, normed):
    texts, hidden = write_hidden_states(tmp_path / "hs", target, normed=normed, mask=True)
    dataset = load_dataset(tmp_path / "hs")
    # 2 before 10: by number, not by name.
    assert [int(t[0]) for t in dataset.tokens] == [int(texts[i, 0]) for i in (0, 2, 1)]
    assert torch.equal(dataset.hidden(1), hidden[2])
    assert num_anchors(dataset.answer[0]) == 5
    frozen = Target(target, "float32", torch.device("cpu"))
    need_norm = check_stored_states(frozen, dataset.tokens[0].long(), dataset.hidden(0))
    assert need_norm is not normed
    dataset = with_finished_states(frozen, dataset)
    group = make_group(frozen, dataset, [0], offsets=2)
    torch.testing.assert_close(group.hidden, frozen.hidden([texts[0]])[0], rtol=1e-3, atol=1e-3)


def test_training_on_hidden_state_files(tmp_path, target):
    write_hidden_states(tmp_path / "hs", target)
    result = train(
        TrainOptions(str(target), str(tmp_path / "hs"), str(tmp_path / "out"), max_steps=2)
    )
    assert result.steps == 2 and (tmp_path / "out" / "model.safetensors").is_file()


def test_hidden_states_of_another_model(tmp_path, target):
    write_hidden_states(tmp_path / "hs", target)
    other = write_llama(tmp_path / "other", seed=9)
    with pytest.raises(TrainingError, match="not this target's"):
        train(TrainOptions(str(other), str(tmp_path / "hs"), str(tmp_path / "out")))


def test_broken_hidden_state_files(tmp_path, target):
    write_hidden_states(tmp_path / "hs", target)
    path = tmp_path / "hs" / "hs_2.safetensors"
    whole = load_file(path)
    save_file({"token_ids": whole["token_ids"]}, path)
    with pytest.raises(TrainingError, match="hs_2.safetensors.*not token_ids and hidden_states"):
        load_dataset(tmp_path / "hs")
    save_file({**whole, "token_ids": whole["token_ids"][:5].clone()}, path)
    with pytest.raises(TrainingError, match=r"hs_2.*shape \[12, 3, 64\], but \[5, layers"):
        load_dataset(tmp_path / "hs")
    path.write_bytes(b"no")
    with pytest.raises(TrainingError, match="hs_2.safetensors' cannot be read"):
        load_dataset(tmp_path / "hs")


def test_anchors_and_what_follows_them(target):
    """By the definition: context at t, known token t+1, offset i predicts t+2+i."""
    frozen = Target(target, "float32", torch.device("cpu"))
    tokens = [torch.tensor([9, 8, 7, 6, 5]), torch.tensor([1, 2, 3])]
    answer = [torch.arange(5) >= 2, torch.arange(3) >= 1]
    dataset = Dataset(tokens, answer, {})
    group = make_group(frozen, dataset, [0, 1], offsets=3)
    # Sequence 0: answers at 2, 3, 4; t = 1, 2. Sequence 1 begins at row 5; answers at 1, 2; t = 0.
    assert group.anchor.tolist() == [1, 2, 5]
    assert group.valid.tolist() == [
        [True, True, False], [True, False, False], [True, False, False]
    ]  # fmt: skip
    assert group.tokens.tolist() == [[7, 6, 5, 0], [6, 5, 0, 0], [2, 3, 0, 0]]
    assert [num_anchors(a) for a in answer] == [2, 1]
    rows = group.teacher_rows(torch.arange(3))
    said = frozen.probabilities(group.hidden, frozen.head)
    for a, i in ((0, 0), (0, 1), (1, 0), (2, 0)):
        sequence = 0 if a < 2 else 1
        upto = int(group.anchor[a]) + 1 + i - 5 * sequence
        [alone] = frozen.hidden([tokens[sequence][: upto + 1]])
        logits = alone[-1] @ frozen.head.T
        torch.testing.assert_close(said[rows[a, i]], logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_hidden_states_do_not_depend_on_how_many_are_asked_for(target, monkeypatch):
    frozen = Target(target, "float32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(300, (n,), generator=generator) for n in (9, 3, 30, 1, 12, 9)]
    monkeypatch.setattr("vllm_redrafter.training.target._PASS_TOKENS", 24)
    together = frozen.hidden(sequences)
    for sequence, states in zip(sequences, together, strict=True):
        assert states.shape == (len(sequence), frozen.hidden_size)
        torch.testing.assert_close(states, frozen.hidden([sequence])[0], rtol=1e-4, atol=1e-4)


def test_passes_hold_what_fits_padding_included():
    assert padded_groups([9, 3, 30, 1, 12, 9], 24) == [[3, 1], [0, 5], [4], [2]]
    assert padded_groups([], 24) == []


def test_the_draft_vocabulary_is_the_most_frequent_answer_tokens():
    tokens = [torch.tensor([5, 5, 5, 1, 2, 2, 3])]
    dataset = Dataset(tokens, [torch.arange(7) >= 3], {})
    chosen = choose(dataset, [0], 2, 8)
    assert chosen.ids.tolist() == [1, 2]  # 5 is the prompt's; 1 before 3, being lower
    assert chosen.coverage == 0.75
    assert chosen.rows.tolist() == [-1, 0, 1, -1, -1, -1, -1, -1]
    assert choose(dataset, [0], 8, 8).ids is None


def test_groups_hold_what_fits_and_at_least_one():
    assert pack([0, 1, 2, 3], [4, 4, 20, 1], 8) == [[0, 1], [2], [3]]


def test_held_out_sequences_are_others():
    dataset = Dataset([torch.zeros(4)] * 50, [torch.ones(4, dtype=torch.bool)] * 50, {})
    members, held_out = split(dataset, 0.1, seed=0)
    assert len(held_out) == 5 and sorted(members + held_out) == list(range(50))
    assert split(dataset, 0, seed=0)[1] == []


def test_manifest_counts(tmp_path):
    directory = write_dataset(tmp_path / "d", torch.randint(256, (5, 9)))
    totals = json.loads((directory / MANIFEST).read_text())["totals"]
    assert totals == {"sequences": 5, "tokens": 45, "answer_tokens": 35, "dropped": {}}


def test_several_datasets_are_joined_in_order(tmp_path):
    texts = torch.randint(256, (7, 9))
    parts = [write_dataset(tmp_path / "a", texts[:4]), write_dataset(tmp_path / "b", texts[4:])]
    both = join([load_dataset(part) for part in parts])
    assert torch.equal(torch.stack(both.tokens).long(), texts)
    assert len(both.answer) == 7 and both.hidden is None


def test_joined_hidden_states_stay_with_their_sequence():
    datasets = [
        Dataset([torch.zeros(2)] * 2, [torch.ones(2).bool()] * 2, {}, lambda i, k=k: 10 * k + i)
        for k in (0, 1)
    ]
    assert [join(datasets).hidden(i) for i in range(4)] == [0, 1, 10, 11]
    plain = Dataset([torch.zeros(2)], [torch.ones(2).bool()], {})
    assert [join([plain, datasets[1]]).hidden(i) for i in range(3)] == [None, 10, 11]


def test_every_dataset_must_fit_the_target(tmp_path):
    target = write_llama(tmp_path / "target")
    good = write_dataset(tmp_path / "a", torch.randint(256, (4, 9)))
    bad = write_dataset(tmp_path / "b", torch.randint(256, (4, 9)))
    manifest = json.loads((bad / MANIFEST).read_text())
    (bad / MANIFEST).write_text(json.dumps(manifest | {"vocab_size": 77}))
    with pytest.raises(TrainingError, match="b' was made with a vocabulary of 77"):
        train(TrainOptions(target=str(target), data=(str(good), str(bad)), out=str(tmp_path / "o")))
