# SPDX-License-Identifier: Apache-2.0
"""Drafter directories that cannot be used: one sentence, before any engine starts."""

import json
import logging

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from vllm_redrafter.drafter.config import DrafterError


def change_config(directory, remove=(), **fields):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    tiny_models.write_json(path, {k: v for k, v in config.items() if k not in remove})


def change_tensors(directory, remove=(), **tensors):
    path = directory / "model.safetensors"
    kept = {**load_file(path), **tensors}
    save_file({k: v for k, v in kept.items() if k not in remove}, path)


def draft_vocab(directory, ids, size=8):
    change_config(directory, draft_vocab_size=size)
    head = torch.zeros(size, tiny_models.HIDDEN)
    change_tensors(directory, **{"lm_head.1.weight": head, "draft_vocab": ids})


@pytest.fixture
def message(engine_config):
    """What the user reads: one sentence on one line, about the given directory."""

    def refused(directory):
        with pytest.raises(DrafterError) as raised:
            engine_config(drafter_dir=directory)
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".")
        assert str(directory) in text
        return text

    return refused


def test_the_unspoilt_drafter_is_accepted(engine_config, own_drafter):
    config = engine_config(drafter_dir=own_drafter)
    assert config.additional_config["redrafter"]["model"] == str(own_drafter)


def test_missing_directory(message, tmp_path):
    text = message(tmp_path / "nowhere")
    assert "does not exist; give the path of a local directory" in text


def test_hub_name_that_cannot_be_downloaded(message, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    text = message("someone/some-drafter")
    assert "could not be downloaded (no route to host); give the path of a directory" in text


def test_directory_without_config(message, own_drafter):
    (own_drafter / "config.json").unlink()
    assert "has no config.json; give the directory of a drafter" in message(own_drafter)


@pytest.mark.parametrize("content", ["{nope", "", "\x00"])
def test_config_that_is_no_json(message, own_drafter, content):
    (own_drafter / "config.json").write_text(content)
    assert "config.json is not readable JSON" in message(own_drafter)


def test_config_that_is_no_object(message, own_drafter):
    (own_drafter / "config.json").write_text("[1, 2]")
    assert "holds a list, not a JSON object" in message(own_drafter)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "exit_dim", "num_draft_layers"])
def test_config_without_a_field(message, own_drafter, field):
    change_config(own_drafter, remove=[field])
    assert f"lacks the field '{field}'; add it (an integer >= " in message(own_drafter)


def test_config_with_nothing_but_the_model_type(message, own_drafter):
    tiny_models.write_json(own_drafter / "config.json", {"model_type": "redrafter"})
    assert "lacks the field 'vocab_size'" in message(own_drafter)


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True])
def test_config_with_an_impossible_size(message, own_drafter, value):
    change_config(own_drafter, hidden_size=value)
    assert f"hidden_size is {value!r}; it must be an integer >= 1" in message(own_drafter)


@pytest.mark.parametrize("model_type", ["llama", None, ["redrafter"]])
def test_wrong_model_type(message, own_drafter, model_type):
    change_config(own_drafter, model_type=model_type)
    text = message(own_drafter)
    assert f"has model_type {model_type!r}" in text
    assert "'redrafter' or 'recurrent_drafting_drafter'" in text
    assert "give a drafter's directory" in text


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=str)
def test_truncated_safetensors(message, own_drafter, keep):
    path = own_drafter / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    text = message(own_drafter)
    assert "cannot be read (" in text and "copy or download it again" in text


def test_file_that_is_no_safetensors(message, own_drafter):
    (own_drafter / "model.safetensors").write_bytes(b"<html>" * 100)
    assert "it is truncated or not safetensors" in message(own_drafter)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "drafter.pth"])
def test_only_pickled_weights(message, own_drafter, name):
    (own_drafter / "model.safetensors").rename(own_drafter / name)
    text = message(own_drafter)
    assert f"holds {name} but no safetensors" in text
    assert f"run `vllm-redrafter convert {own_drafter} OUT` and use OUT" in text


def test_no_weights(message, own_drafter):
    (own_drafter / "model.safetensors").unlink()
    assert "has no model.safetensors; put the drafter's weights there" in message(own_drafter)


def test_missing_shard(message, own_drafter):
    (own_drafter / "model.safetensors").unlink()
    tiny_models.write_json(
        own_drafter / "model.safetensors.index.json",
        {"weight_map": {"rnn_u.weight": "model-00001-of-00002.safetensors"}},
    )
    assert "model-00001-of-00002.safetensors cannot be read" in message(own_drafter)


def test_wrong_vocabulary(message, tmp_path):
    other = tiny_models.write_random_drafter(
        tmp_path / "other", vocab_size=100, draft_vocab_size=100
    )
    text = message(other)
    assert "has vocab_size 100, but the target" in text and "has 320" in text
    assert "use a drafter that was trained for this target" in text


@pytest.mark.parametrize("vocab", [283, 321])
def test_another_tokenizers_vocabulary(message, tmp_path, vocab):
    """More than an eighth too small, or too large at all."""
    other = tiny_models.write_random_drafter(
        tmp_path / "other", vocab_size=vocab, draft_vocab_size=vocab
    )
    assert f"has vocab_size {vocab}, but the target" in message(other)


def test_a_target_with_added_tokens(engine_config, tmp_path, caplog, monkeypatch):
    other = tiny_models.write_random_drafter(
        tmp_path / "other", vocab_size=300, draft_vocab_size=300
    )
    # vLLM's logger keeps its records to itself.
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING", logger="vllm"):
        assert engine_config(drafter_dir=other)
    assert "20 tokens more than the drafter's vocab_size 300" in caplog.text


def test_wrong_hidden_size(message, tmp_path):
    text = message(tiny_models.write_random_drafter(tmp_path / "other", hidden_size=32))
    assert "has hidden_size 32, but the target" in text and "has 64" in text
    assert "use a drafter that was trained for this target" in text


def test_tensor_of_wrong_shape(message, own_drafter):
    change_tensors(own_drafter, **{"rnn_u.weight": torch.zeros(3, 4)})
    text = message(own_drafter)
    assert "rnn_u.weight has shape [3, 4], but config.json asks for [64, 64]" in text


def test_tensor_of_wrong_dtype(message, own_drafter):
    change_tensors(own_drafter, **{"rnn_u.weight": torch.zeros(64, 64, dtype=torch.int32)})
    assert "rnn_u.weight is torch.int32; weights must be stored as floats" in message(own_drafter)


def test_missing_tensor(message, own_drafter):
    change_tensors(own_drafter, remove=["rnn_u.weight"])
    assert "lacks the tensor 'rnn_u.weight' that its config.json asks for" in message(own_drafter)


def test_surplus_tensor(message, own_drafter):
    change_tensors(own_drafter, **{"lm_head.7.weight": torch.zeros(2, 2)})
    text = message(own_drafter)
    assert "has a tensor 'lm_head.7.weight' for which there is no place" in text


def test_rnn_that_contradicts_the_tensors(message, own_drafter):
    change_config(own_drafter, rnn=False)
    text = message(own_drafter)
    assert "rnn is false, but the tensor rnn_w.weight is present; make them agree" in text


def test_draft_vocab_that_fits_is_accepted(engine_config, own_drafter):
    draft_vocab(own_drafter, torch.arange(100, 108))
    assert engine_config(drafter_dir=own_drafter)


def test_draft_vocab_with_duplicates(message, own_drafter):
    draft_vocab(own_drafter, torch.tensor([1, 2, 3, 4, 5, 6, 7, 6]))
    text = message(own_drafter)
    assert "draft_vocab holds the id 6 more than once; all ids must differ" in text


@pytest.mark.parametrize("first, last", [(316, 323), (-1, 6)])
def test_draft_vocab_out_of_range(message, own_drafter, first, last):
    draft_vocab(own_drafter, torch.arange(first, last + 1))
    text = message(own_drafter)
    assert f"ids from {first} to {last}; every id must be from 0 to 319" in text


@pytest.mark.parametrize("ids", [torch.arange(7), torch.arange(9), torch.zeros(2, 4).long()])
def test_draft_vocab_of_wrong_length(message, own_drafter, ids):
    draft_vocab(own_drafter, ids)
    text = message(own_drafter)
    assert f"draft_vocab has shape {list(ids.shape)}, but config.json" in text
    assert "draft_vocab_size 8: make them agree" in text


def test_draft_vocab_of_floats(message, own_drafter):
    draft_vocab(own_drafter, torch.arange(8) + 0.5)
    assert "token ids must be stored as integers" in message(own_drafter)


def test_draft_vocab_missing(message, own_drafter):
    change_config(own_drafter, draft_vocab_size=8)
    change_tensors(own_drafter, **{"lm_head.1.weight": torch.zeros(8, tiny_models.HIDDEN)})
    assert "there is no tensor 'draft_vocab' of as many ids" in message(own_drafter)


def test_draft_vocab_larger_than_the_vocabulary(message, own_drafter):
    change_config(own_drafter, draft_vocab_size=999)
    assert "draft_vocab_size 999 is larger than vocab_size 320" in message(own_drafter)
