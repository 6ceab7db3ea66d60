# SPDX-License-Identifier: Apache-2.0
"""Damaged drafter directories: a sentence or a right load, at once, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from fuzz.mutate import changed, json_bytes, other_tensors, safetensors_bytes
from fuzz.sentences import Outcomes
from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.drafter.checkpoint import check_files, load_drafter, save_drafter
from vllm_redrafter.drafter.config import DrafterError, load_config
from vllm_redrafter.options import OptionError, resolve_options

APPLE = Path(__file__).resolve().parents[1] / "conformance" / "input_proj"


def counts(few, many):
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def drafters(tmp_path_factory):
    """Directories of each kind: own head, draft vocabulary, shared head, Apple's."""
    root = tmp_path_factory.mktemp("drafters")
    tiny_models.write_random_drafter(root / "own")
    some = tiny_models.random_drafter(draft_vocab_size=8, num_draft_layers=2)
    some.draft_vocab = torch.arange(100, 108)
    schedule = [[1, 4, 8], [5, 64, 2]]
    save_drafter(some, root / "some", beam_width=3, num_speculative_tokens_per_batch_size=schedule)
    shared = tiny_models.random_drafter(shared_head=True, draft_vocab_size=8)
    shared.draft_vocab = torch.arange(8)
    save_drafter(shared, root / "shared", top_k=4, tree="best")
    shutil.copytree(APPLE, root / "apple")
    return sorted(path for path in root.iterdir())


def draft_from(directory: Path) -> None:
    """All that a server does with the directory before and at its first draft."""
    config = load_config(directory)
    options = resolve_options({"model": str(directory)}, config)
    check_files(directory, config)
    # One row in memory, whatever the config says; a target's table would be compared with it.
    head = torch.ones(1, config.hidden_size).expand(config.vocab_size, config.hidden_size)
    if config.shared_head and not config.has_draft_vocab and config.vocab_size > 10**5:
        return  # such a head would be copied
    drafter = load_drafter(directory, embedding=head, lm_head=head, dtype=torch.float32)
    context = torch.ones(1, config.hidden_size)
    width = min(options.beam_width, 4)
    beams = beam_search(drafter, context, torch.tensor([0]), width, min(options.draft_length, 2),
                        options.top_k)  # fmt: skip
    assert beams.tokens.max() < config.vocab_size and beams.tokens.min() >= 0


@counts(400, 10_000)
def test_configs(drafters, tmp_path, count):
    source = random.Random(1)
    outcomes = Outcomes(DrafterError, OptionError)
    directories = []
    for good in drafters:
        shutil.copytree(good, tmp_path / good.name)
        directories.append((tmp_path / good.name, json.loads((good / "config.json").read_text())))
    for number in range(count):
        directory, config = source.choice(directories)
        data = json_bytes(changed(config, source, source.randrange(1, 4)), source)
        (directory / "config.json").write_bytes(data)
        outcomes.run((number, data[:500]), lambda d=directory: draft_from(d))
    outcomes.check(least_loaded=count // 20, least_refused=count // 3)


@counts(200, 6_000)
def test_safetensors(drafters, tmp_path, count):
    source = random.Random(2)
    outcomes = Outcomes(DrafterError)
    directories = []
    for good in drafters:
        shutil.copytree(good, tmp_path / good.name)
        path = tmp_path / good.name / "model.safetensors"
        directories.append((path, path.read_bytes(), load_file(path)))
    for number in range(count):
        path, data, tensors = source.choice(directories)
        spoilt = (
            safetensors_bytes(data, source) if source.random() < 0.7
            else other_tensors(tensors, source)
        )  # fmt: skip
        # A new file: the one before may still be mapped.
        path.unlink()
        path.write_bytes(spoilt)
        outcomes.run((number, path.parent.name), lambda d=path.parent: draft_from(d))
    outcomes.check(least_refused=count // 3)


@counts(100, 1_000)
def test_shard_indexes(drafters, tmp_path, count):
    source = random.Random(3)
    outcomes = Outcomes(DrafterError)
    shutil.copytree(drafters[1], tmp_path / "d")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    (tmp_path / "d" / "model.safetensors").unlink()
    # What a name outside of the directory would reach.
    save_file(tensors, tmp_path / "model.safetensors")
    weight_map = {}
    for number, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{number % 2}.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name, at in weight_map.items() if at == file}
        save_file(part, tmp_path / "d" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    for number in range(count):
        data = json_bytes(changed(index, source, source.randrange(1, 3)), source)
        (tmp_path / "d" / "model.safetensors.index.json").write_bytes(data)
        outcomes.run((number, data[:500]), lambda: draft_from(tmp_path / "d"))
    outcomes.check(least_refused=count // 3)


@pytest.mark.parametrize("name", ["../model.safetensors", "{absolute}", "sub/model.safetensors"])
def test_a_shard_outside_of_the_directory_is_refused(tmp_path, name):
    tiny_models.write_random_drafter(tmp_path / "d")
    for place in (tmp_path / "model.safetensors", tmp_path / "d" / "sub" / "model.safetensors"):
        place.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "d" / "model.safetensors", place)
    name = name.format(absolute=tmp_path / "model.safetensors")
    names = load_file(tmp_path / "d" / "model.safetensors")
    (tmp_path / "d" / "model.safetensors").unlink()
    tiny_models.write_json(
        tmp_path / "d" / "model.safetensors.index.json",
        {"weight_map": dict.fromkeys(names, name)},
    )
    with pytest.raises(DrafterError, match="must be the name of a file beside the index"):
        load_drafter(tmp_path / "d")


@pytest.mark.parametrize("field", ["num_draft_layers", "hidden_size", "exit_dim", "vocab_size"])
@pytest.mark.parametrize("value", [10**9, 2**63, 10**30])
def test_a_size_that_no_drafter_has_is_refused_at_once(tmp_path, field, value):
    directory = tiny_models.write_random_drafter(tmp_path / "d")
    config = json.loads((directory / "config.json").read_text())
    tiny_models.write_json(directory / "config.json", {**config, field: value})
    if field == "vocab_size" and value < 2**31:
        match = "there is no tensor 'draft_vocab'"
    else:
        match = f"{field} is {value}; no drafter is so large"
    with pytest.raises(DrafterError, match=match):
        load_drafter(directory)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_loaded_drafter_does_not_read_its_files_again(tmp_path, dtype):
    """A file rewritten in place must not change a running engine, or end it."""
    before = tiny_models.random_drafter(draft_vocab_size=8)
    before.draft_vocab = torch.arange(8) * 3
    save_drafter(before, tmp_path)
    path = tmp_path / "model.safetensors"
    # Ids in the very type that is used: nothing has to be converted.
    save_file({**load_file(path), "draft_vocab": before.draft_vocab}, path)
    drafter = load_drafter(tmp_path, dtype=dtype)
    kept = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    with open(path, "r+b") as file:
        size = len(file.read())
        file.seek(0)
        file.write(b"\xff" * size)
    assert drafter.draft_vocab.tolist() == before.draft_vocab.tolist()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
