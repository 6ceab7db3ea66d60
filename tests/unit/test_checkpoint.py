# SPDX-License-Identifier: Apache-2.0
"""Drafter directories through ``load_drafter`` and ``save_drafter``, without any engine."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from vllm_redrafter.drafter.checkpoint import (
    check_files,
    expected_shapes,
    load_drafter,
    save_drafter,
)
from vllm_redrafter.drafter.config import DrafterError, load_config

VOCAB, HIDDEN = tiny_models.VOCAB, tiny_models.HIDDEN
APPLE = Path(__file__).resolve().parents[1] / "conformance" / "input_proj"

SHAPES = {
    "plain": {},
    "no rnn": {"rnn": False},
    "no blocks": {"num_draft_layers": 0},
    "three blocks": {"num_draft_layers": 3},
    "no input projection": {"exit_dim": 2 * HIDDEN},
    "odd width": {"exit_dim": 37},
}


def tables(rows=VOCAB, width=HIDDEN):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, width, generator=generator) for _ in range(2))


def evaluate(drafter):
    drafter.embedding = next(tables())
    context = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([1, 2, 300])
    logits, state = drafter(context.to(drafter.dtype), tokens, drafter.initial_state(3))
    return torch.cat([logits, state], dim=-1)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_drafter(tmp_path, fields, dtype):
    before = tiny_models.random_drafter(**fields).to(dtype)
    save_drafter(before, tmp_path / "drafter", beam_width=3)
    after = load_drafter(tmp_path / "drafter")
    assert after.dtype is dtype
    assert torch.equal(evaluate(after), evaluate(before))
    assert after.config.defaults == {"beam_width": 3}
    assert not after.training and not any(p.requires_grad for p in after.parameters())


def test_file_holds_apples_names_and_nothing_of_the_target(tmp_path):
    drafter = tiny_models.random_drafter()
    drafter.embedding = next(tables())
    save_drafter(drafter, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {
        "input_proj.weight", "input_proj.bias", "rnn_u.weight", "rnn_u.bias", "rnn_w.weight",
        "lm_head.0.linear.weight", "lm_head.0.linear.bias", "lm_head.1.weight",
    }  # fmt: skip


def test_dtype_of_the_callers_choice(tmp_path):
    save_drafter(tiny_models.random_drafter(), tmp_path)
    drafter = load_drafter(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}


def test_draft_vocabulary(tmp_path):
    before = tiny_models.random_drafter(draft_vocab_size=5)
    before.draft_vocab = torch.tensor([319, 0, 7, 12, 3])
    save_drafter(before, tmp_path)
    after = load_drafter(tmp_path)
    assert after.draft_vocab.tolist() == [319, 0, 7, 12, 3]
    assert after.to_target_ids(torch.tensor([0, 4])).tolist() == [319, 3]
    assert torch.equal(evaluate(after), evaluate(before))


@pytest.mark.parametrize("ids", [None, [319, 0, 7]])
def test_shared_head_takes_the_targets_rows(tmp_path, ids):
    embedding, lm_head = tables(rows=VOCAB + 64)  # engines pad their tables
    before = tiny_models.random_drafter(
        shared_head=True, draft_vocab_size=len(ids) if ids else VOCAB
    )
    before.draft_vocab = torch.tensor(ids) if ids else None
    save_drafter(before, tmp_path)
    assert "lm_head.1.weight" not in load_file(tmp_path / "model.safetensors")
    after = load_drafter(tmp_path, embedding=embedding, lm_head=lm_head)
    assert torch.equal(after.lm_head[-1].weight, lm_head[ids] if ids else lm_head[:VOCAB])
    with pytest.raises(DrafterError, match="pass the target's lm_head weight"):
        load_drafter(tmp_path, embedding=embedding)


def test_the_targets_embedding_is_referred_to(tmp_path):
    save_drafter(tiny_models.random_drafter(), tmp_path)
    embedding = next(tables())
    drafter = load_drafter(tmp_path, embedding=embedding)
    assert drafter.embedding.data_ptr() == embedding.data_ptr()
    assert "embedding" not in drafter.state_dict()


def test_drafting_without_an_embedding_says_so(tmp_path):
    save_drafter(tiny_models.random_drafter(), tmp_path)
    with pytest.raises(RuntimeError, match="bind the target's embedding table"):
        load_drafter(tmp_path).embed(torch.tensor([1]))


@pytest.mark.parametrize(
    "rows, width, message",
    [
        (319, HIDDEN, f"vocab_size {VOCAB}, but the target's input embedding has 319"),
        (VOCAB, 32, f"hidden_size {HIDDEN}, but the target's input embedding has 32"),
    ],
)
def test_tables_of_another_target(tmp_path, rows, width, message):
    save_drafter(tiny_models.random_drafter(), tmp_path)
    with pytest.raises(DrafterError, match=message):
        load_drafter(tmp_path, embedding=next(tables(rows, width)))


def test_apples_directory_as_it_is():
    drafter = load_drafter(APPLE)
    assert drafter.config.apple and drafter.config.defaults == {"top_k": 50}
    assert drafter.config.has_input_proj and drafter.config.rnn


def test_apples_unused_norm_is_ignored(tmp_path):
    shutil.copytree(APPLE, tmp_path / "apple")
    path = tmp_path / "apple" / "model.safetensors"
    save_file({**load_file(path), "emb_norm.weight": torch.ones(16)}, path)
    assert load_drafter(tmp_path / "apple")


def test_rnn_left_out_of_the_config_follows_the_tensors(tmp_path):
    for rnn in (True, False):
        directory = tmp_path / str(rnn)
        save_drafter(tiny_models.random_drafter(rnn=rnn), directory)
        config = json.loads((directory / "config.json").read_text())
        del config["rnn"]
        (directory / "config.json").write_text(json.dumps(config))
        assert load_drafter(directory).config.rnn is rnn


def test_shards(tmp_path):
    before = tiny_models.random_drafter()
    save_drafter(before, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:4], names[4:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(evaluate(load_drafter(tmp_path)), evaluate(before))


def test_an_unrelated_file_beside_the_weights_does_not_matter(tmp_path):
    before = tiny_models.random_drafter()
    save_drafter(before, tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "embeddings.safetensors")
    assert torch.equal(evaluate(load_drafter(tmp_path)), evaluate(before))


def test_check_files_refuses_what_load_drafter_refuses(tmp_path):
    save_drafter(tiny_models.random_drafter(), tmp_path)
    check_files(tmp_path, load_config(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["rnn_u.bias"]
    save_file(tensors, path)
    for refused in (lambda: check_files(tmp_path, load_config(tmp_path)),
                    lambda: load_drafter(tmp_path)):  # fmt: skip
        with pytest.raises(DrafterError, match="lacks the tensor 'rnn_u.bias'"):
            refused()


def test_expected_shapes_are_apples(tmp_path):
    config = load_config(APPLE)
    stored = load_file(APPLE / "model.safetensors")
    rnn = load_drafter(APPLE).config
    assert config.rnn in (True, None)
    assert expected_shapes(rnn) == {name: tuple(t.shape) for name, t in stored.items()}
