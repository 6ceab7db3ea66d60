# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter convert --target`: the drafter's config.json knows the target."""

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from vllm_redrafter.cli import main
from vllm_redrafter.drafter.config import load_config
from vllm_redrafter.drafter.fingerprint import difference, sample
from vllm_redrafter.training.fingerprint import of_directory
from vllm_redrafter.training.target import Target, tokenizer_sha256


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_models.write_llama(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture
def drafter(tmp_path):
    return tiny_models.write_random_drafter(tmp_path / "drafter")


def error(capsys, *argv):
    assert main(["convert", *map(str, argv)]) == 1
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text
    return text


def changed(target, tmp_path, rename=lambda name: name, **config):
    """A copy of the target with other names or fields; nothing removes a tensor, None a field."""
    out = tmp_path / "changed"
    shutil.copytree(target, out)
    tensors = load_file(out / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items() if rename(name)}
    save_file(renamed, out / "model.safetensors")
    fields = json.loads((out / "config.json").read_text()) | config
    fields = {name: value for name, value in fields.items() if value is not None}
    tiny_models.write_json(out / "config.json", fields)
    return out


def test_it_is_written_and_kept(target, drafter, tmp_path, capsys):
    known, again = tmp_path / "known", tmp_path / "again"
    assert main(["convert", str(drafter), str(known), "--target", str(target)]) == 0
    assert main(["convert", str(known), str(again)]) == 0
    found = load_config(known).target
    assert found == load_config(again).target == of_directory(target)
    assert load_config(drafter).target is None
    tables = load_file(target / "model.safetensors")
    assert found.embedding == sample(tables["model.embed_tokens.weight"], 320, 64)
    assert found.head == sample(tables["lm_head.weight"], 320, 64)
    assert difference(found.embedding, found.head) > 0.5
    assert found.num_hidden_layers == 2
    assert found.tokenizer_sha256 == tokenizer_sha256(target)


def test_a_loaded_target_has_the_same(target):
    from vllm_redrafter.training.fingerprint import of_target

    loaded = Target(target, "float32", torch.device("cpu"))
    assert of_target(loaded, target) == of_directory(target)


@pytest.mark.parametrize("said", [True, None])
def test_a_tied_head(target, tmp_path, said):
    directory = changed(
        target, tmp_path, lambda name: "" if "lm_head" in name else name, tie_word_embeddings=said
    )
    found = of_directory(directory)
    assert found.head == found.embedding == of_directory(target).embedding


def test_a_head_that_is_there_but_tied_is_not_read(target, tmp_path):
    found = of_directory(changed(target, tmp_path, tie_word_embeddings=True))
    assert found.head == found.embedding


@pytest.mark.parametrize(
    "names",
    [
        {"model.embed_tokens": "transformer.wte"},
        {"model.embed_tokens": "gpt_neox.embed_in", "lm_head": "embed_out"},
        {"model": "model.language_model"},
    ],
    ids=["gpt2", "gpt_neox", "nested"],
)
def test_other_names(target, tmp_path, names):
    def rename(name):
        for ours, other in names.items():
            if name.startswith(ours):
                return other + name.removeprefix(ours)
        return name

    assert of_directory(changed(target, tmp_path, rename)) == of_directory(target)


def test_sizes_inside_text_config(target, tmp_path):
    text = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}
    found = of_directory(
        changed(target, tmp_path, text_config=text, vocab_size=None, hidden_size=None)
    )
    assert found.embedding == of_directory(target).embedding


def test_tables_that_are_not_found(target, drafter, tmp_path, capsys):
    for part, what in (("embed_tokens", "input embedding"), ("lm_head", "output head")):
        directory = changed(target, tmp_path / part, lambda name, p=part: name.replace(p, "other"))
        text = error(capsys, drafter, tmp_path / "out", "--target", directory)
        assert f"no {what} was found among the safetensors in '{directory}'" in text
        assert text.endswith("leave --target out.") and not (tmp_path / "out").exists()


def test_no_target(drafter, tmp_path, capsys):
    text = error(capsys, drafter, tmp_path / "out", "--target", tmp_path / "nothing")
    assert "is not a directory with config.json; give a local model directory" in text


def test_a_target_of_other_sizes(target, tmp_path, capsys):
    small = tiny_models.write_random_drafter(tmp_path / "small", hidden_size=32)
    text = error(capsys, small, tmp_path / "out", "--target", target)
    assert f"has hidden_size 32, but the target '{target}' has 64" in text


def test_apples_format_has_no_place_for_it(target, drafter, tmp_path, capsys):
    text = error(capsys, drafter, tmp_path / "out", "--target", target, "--to", "apple")
    assert "Apple's format has no place for a fingerprint; leave out --target" in text


def test_truncated_target(target, drafter, tmp_path, capsys):
    directory = changed(target, tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:100])
    text = error(capsys, drafter, tmp_path / "out", "--target", directory)
    assert "model.safetensors cannot be read (" in text
