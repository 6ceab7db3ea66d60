# SPDX-License-Identifier: Apache-2.0
"""Damaged inputs of training: a sentence or a right load, at once, and nothing else."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file, save_file

from fuzz.mutate import changed, json_bytes, other_tensors, safetensors_bytes, spoilt
from fuzz.sentences import Outcomes
from vllm_redrafter.budget.costs import CostTable, CostTableError, read_table
from vllm_redrafter.cli import UserError
from vllm_redrafter.cli.fields import read_fields
from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.training.answers import read_answers
from vllm_redrafter.training.batches import Schedule, make_group, num_anchors, split
from vllm_redrafter.training.costs import read_costs
from vllm_redrafter.training.data import Item, _context, _totals, _write_shard
from vllm_redrafter.training.dataset import check_fits, load_dataset
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import sha256, write_json
from vllm_redrafter.training.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from vllm_redrafter.training.options import DataOptions, TrainOptions
from vllm_redrafter.training.prompts import read_prompts
from vllm_redrafter.training.replay import Setting
from vllm_redrafter.training.target import Target, with_finished_states
from vllm_redrafter.training.train import train
from vllm_redrafter.training.vocabulary import choose, read_counts

VOCAB = tiny_models.VOCAB
LENGTH = 9


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_models.write_llama(tmp_path_factory.mktemp("fuzz") / "target", context_weight=0.3)


@pytest.fixture(scope="module")
def frozen(target):
    return Target(target, "float32", torch.device("cpu"))


class Files:
    """One good input of each kind, in a directory of its own, and what reads it.

    Every method ``spoil_X`` writes a damaged X and returns the function that reads it.
    """

    def __init__(self, root: Path, frozen: Target) -> None:
        self.root, self.frozen = root, frozen
        texts, hidden = tiny_models.greedy_rollouts(root / "target", rows=4, length=LENGTH)
        self.write_shards(texts, hidden)
        (root / "hs").mkdir()
        for i, (ids, states) in enumerate(zip(texts, hidden, strict=True)):
            stacked = states[:, None].expand(-1, 3, -1).contiguous()
            mask = torch.arange(LENGTH) >= 2
            save_file({"token_ids": ids, "hidden_states": stacked, "loss_mask": mask},
                      root / "hs" / f"hs_{i}.safetensors")  # fmt: skip
        self.answers = [
            {"prompt_token_ids": [1, 2], "token_ids": [3, 4, 5], "category": "a",
             "continuation": [6], "finish_reason": "length", "max_tokens": 3},
            {"prompt_token_ids": [1], "token_ids": [3, 4]},
        ]  # fmt: skip
        self.prompts = [{"prompt": "what?"}, {"messages": [
            {"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}]  # fmt: skip

    def write_shards(self, texts, hidden):
        """As `data --hidden-states` does."""
        out = self.root / "data"
        out.mkdir()
        items = [Item(ids.tolist(), 2, 0.0, i % 2 == 0, i, states[1:-1])
                 for i, (ids, states) in enumerate(zip(texts, hidden, strict=True))]  # fmt: skip
        entries = [_write_shard(out, n, part, {}) for n, part in enumerate((items[:2], items[2:]))]
        self.manifest = {
            "format": FORMAT, "version": FORMAT_VERSION, "target": "tiny", "vocab_size": VOCAB,
            "tokenizer_sha256": None, "options": {"seed": 0}, "shards": entries,
            "totals": _totals(entries), "complete": True,
        }  # fmt: skip
        write_json(out / MANIFEST, self.manifest)

    def use(self, directory: Path) -> None:
        """All that training does with a dataset before its first step."""
        dataset = load_dataset(directory, LENGTH - 1)
        check_fits(dataset, VOCAB, None, str(directory))
        dataset = with_finished_states(self.frozen, dataset)
        for tokens, answer in zip(dataset.tokens, dataset.answer, strict=True):
            assert tokens.dtype == torch.int32 and answer.dtype == torch.bool
            assert len(tokens) == len(answer) >= 1 and tokens.min() >= 0
        members, _ = split(dataset, 0.3, seed=0)
        if not members:
            return
        chosen = choose(dataset, members, 8, VOCAB)
        assert chosen.ids.unique().numel() == 8
        anchors = [num_anchors(answer) for answer in dataset.answer]
        lengths = [len(tokens) for tokens in dataset.tokens]
        schedule = Schedule(members, anchors, lengths, group_tokens=64, batch_size=4, seed=0)
        for place in schedule.epoch(0)[:1]:
            group = make_group(self.frozen, dataset, place.members, offsets=3)
            assert group.hidden.isfinite().all() and group.valid.any()

    def shards_with(self, name: str, digest: str, data: bytes, source: random.Random):
        """The dataset with another file in it, whose hash the manifest knows."""
        out = self.fresh("data")
        manifest = json.loads(json.dumps(self.manifest))
        entry = source.choice(manifest["shards"])
        (out / entry[name]).write_bytes(data)
        entry[digest] = sha256(data)
        write_json(out / MANIFEST, manifest)
        return out

    def fresh(self, name: str) -> Path:
        out = self.root / "case"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.root / name, out)
        return out

    def file(self, data: bytes) -> Path:
        path = self.root / "case.txt"
        path.write_bytes(data)
        return path

    def other(self, path: Path, source: random.Random) -> bytes:
        if source.random() < 0.5:
            return safetensors_bytes(path.read_bytes(), source)
        return other_tensors(load_file(path), source)

    def lines(self, values, source: random.Random) -> Path:
        parts = [
            json_bytes(changed(v, source) if source.random() < 0.7 else v, source).replace(
                b"\n", b" ")
            for v in values
        ]  # fmt: skip
        return self.file(b"\n".join(parts))

    def spoil_manifest(self, source):
        out = self.fresh("data")
        (out / MANIFEST).write_bytes(json_bytes(changed(self.manifest, source), source))
        return lambda: (self.use(out), read_answers(out, VOCAB))

    def spoil_shard(self, source):
        data = self.other(self.root / "data" / "data-00000.safetensors", source)
        out = self.shards_with("file", "sha256", data, source)
        return lambda: (self.use(out), read_answers(out, VOCAB))

    def spoil_states(self, source):
        data = self.other(self.root / "data" / "states-00000.safetensors", source)
        out = self.shards_with("states", "states_sha256", data, source)
        return lambda: self.use(out)

    def spoil_hidden_states(self, source):
        out = self.fresh("hs")
        path = out / f"hs_{source.randrange(4)}.safetensors"
        path.write_bytes(self.other(path, source))
        return lambda: self.use(out)

    def spoil_prompts(self, source):
        path = self.lines(self.prompts, source)
        return lambda: read_prompts(path)

    def spoil_answers(self, source):
        path = self.lines(self.answers, source)
        return lambda: read_answers(path, VOCAB)

    def spoil_counts(self, source):
        numbers = [str(n) for n in range(VOCAB)]
        for _ in range(source.randrange(3)):
            numbers[source.randrange(VOCAB)] = source.choice(
                ("-1", "1.5", "", "x", str(2**63), "9" * 30, "9" * 5000, "1_0", "\u0661", "\0")
            )
        data = "\n".join(numbers[: source.choice((VOCAB, VOCAB, VOCAB - 1))]).encode()
        path = self.file(spoilt(data, source) if source.random() < 0.2 else data)
        return lambda: read_counts(path, VOCAB)

    def spoil_costs(self, source):
        good = {"plain_ms": 30.0, "draft_ms": {"4,3": 1.0}, "rows_ms": {"1": 30.0, "16": 33.0}}
        path = self.file(json_bytes(changed(good, source), source))

        def read():
            costs = read_costs(path)
            assert costs.rows_ms(12.0) > 0
            assert costs.draft_ms(Setting(4, 3, 11)) >= 0

        return read

    def spoil_cost_table(self, source):
        good = CostTable({"cpu": "x"}, ((1.0, 0.1), (4.0, 0.2)), {(4, 3): ((1.0, 0.01),)}, 1e-9)
        path = self.file(json_bytes(changed(good.to_json(), source), source))

        def read():
            try:
                table = read_table(path, {"cpu": "x"})
            except CostTableError as error:
                raise TrainingError(f"{error}.") from error  # it is a part of a sentence
            assert all(seconds > 0 for _, seconds in table.rows)

        return read

    def spoil_yaml(self, source):
        good = {"target": "t", "data": ["d"], "out": "o", "lr": 1e-3, "blocks": 2, "rnn": True,
                "held-out": 0.02, "loss": "soft", "max_steps": 3, "seed": 0}  # fmt: skip
        value = changed(good, source)
        text = (json.dumps(value) if source.random() < 0.5 else yaml.dump(value)).encode()
        path = self.file(spoilt(text, source) if source.random() < 0.2 else text)
        return lambda: read_fields(argparse.Namespace(config=path), TrainOptions)

    def spoil_target_config(self, source):
        out = self.root / "other"
        out.mkdir(exist_ok=True)
        good = {"vocab_size": 320, "max_position_embeddings": 512, "text_config": {"vocab_size": 3}}
        (out / "config.json").write_bytes(json_bytes(changed(good, source), source))
        options = DataOptions(str(out), str(out))

        def read():
            assert 1 <= _context(options) <= options.max_model_len

        return read


KINDS = sorted(name for name in vars(Files) if name.startswith("spoil_"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, target, frozen):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "target").symlink_to(target)
    return Files(root, frozen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_inputs(files, kind, count):
    source = random.Random(f"{kind} {count}")
    outcomes = Outcomes(TrainingError, DrafterError, UserError)
    for number in range(count):
        read = getattr(files, kind)(source)
        outcomes.run((kind, number), read)
    outcomes.check()


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_checkpoints(files, target, tmp_path, count):
    """Resuming from a damaged checkpoint or log: refused, or the run goes on to its end."""
    source, out = random.Random(7), tmp_path / "out"
    options = {"target": str(target), "data": str(files.root / "data"), "out": str(out),
               "max_steps": 2, "save_every": 1, "plot": False, "offsets": 2, "blocks": 1,
               "draft_vocab_size": 8}  # fmt: skip
    train(TrainOptions(**options))
    aside = out / "training"
    good = {name: (aside / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")}
    saved = torch.load(aside / "checkpoint.pt", weights_only=True)
    saved["step"] = 1
    torch.save(saved, aside / "checkpoint.pt")
    good["checkpoint.pt"] = (aside / "checkpoint.pt").read_bytes()
    outcomes = Outcomes(TrainingError)
    for number in range(count):
        for name, data in good.items():
            (aside / name).write_bytes(data)
        kind = source.randrange(4)
        if kind == 0:
            (aside / "log.jsonl").write_bytes(spoilt(good["log.jsonl"], source))
        elif kind == 1:
            (aside / "checkpoint.pt").write_bytes(spoilt(good["checkpoint.pt"], source))
        else:
            container = source.choice((saved, saved["options"], saved["model"], saved["optimizer"]))
            key = source.choice(sorted(container))
            kept = container[key]
            container[key] = source.choice((None, 1, "x", [], {}, torch.ones(3), -1, [1, 2, 3]))
            torch.save(saved, aside / "checkpoint.pt")
            container[key] = kept

        def resume():
            assert train(TrainOptions(**options, resume=True)).steps == 2

        outcomes.run(number, resume)
    outcomes.check()


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 2**40, 3], "token_ids holds 1 to 1099511627776; token ids are from 0 to 2147483647"),
        ([1, -2, 3], "token_ids holds -2 to 3; token ids are from 0"),
        ([1.0, 1.9, 3.0], "token_ids is torch.float32; token ids must be stored as integers"),
        ([True, False, True], "token_ids is torch.bool; token ids must be stored as integers"),
    ],
)
def test_ids_that_are_none(tmp_path, ids, message):
    save_file({"token_ids": torch.tensor(ids), "hidden_states": torch.ones(3, 1, 4)},
              tmp_path / "hs_0.safetensors")  # fmt: skip
    with pytest.raises(TrainingError, match=message):
        load_dataset(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite(tmp_path, bad):
    """One of them would make every weight NaN."""
    states = torch.ones(3, 1, 4)
    states[1, 0, 2] = bad
    save_file({"token_ids": torch.tensor([1, 2, 3]), "hidden_states": states},
              tmp_path / "hs_0.safetensors")  # fmt: skip
    dataset = load_dataset(tmp_path)
    with pytest.raises(TrainingError, match="hs_0.safetensors' holds hidden states that are not"):
        dataset.hidden(0)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("file", "../data-00000.safetensors", "file is '../data-00000.safetensors', not the name"),
        ("file", "/etc/passwd", "file is '/etc/passwd', not the name of a file beside"),
        ("file", None, "file is None, not the name"),
        ("states", "../x", "states is '../x', not the name"),
        ("sha256", 3, "sha256 is 3, not a SHA-256"),
        ("number", "0", "number is '0', not a count"),
        ("tokens", -1, "tokens is -1, not a count"),
        ("dropped", [1], r"dropped is \[1\], not an object of counts"),
    ],
)
def test_fields_of_a_manifest(files, field, value, message):
    out = files.fresh("data")
    manifest = json.loads(json.dumps(files.manifest))
    manifest["shards"][0][field] = value
    write_json(out / MANIFEST, manifest)
    with pytest.raises(TrainingError, match=message):
        load_dataset(out)
