# SPDX-License-Identifier: Apache-2.0
"""Training: what is saved is what was trained, resuming is exact, and it learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_random_drafter
from training_cases import tokens_per_step, write_dataset

from vllm_redrafter.cli import main
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.training import files, log
from vllm_redrafter.training.batches import RUN, Schedule, make_group
from vllm_redrafter.training.dataset import load_dataset
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.fingerprint import of_directory
from vllm_redrafter.training.model import TrainableDrafter
from vllm_redrafter.training.options import TrainOptions
from vllm_redrafter.training.target import Target
from vllm_redrafter.training.train import offset_weights, train

ROOT = Path(__file__).resolve().parents[2]


def options(target, data, out, **fields) -> TrainOptions:
    usual = {"batch_size": 256, "group_tokens": 2048, "save_dtype": "float32", "plot": False}
    return TrainOptions(str(target), str(data), str(out), **{**usual, **fields})


@pytest.mark.parametrize("loss", ["soft", "hard"])
def test_training_raises_acceptance_from_chance_to_above_two(tmp_path, target, data, loss):
    write_random_drafter(tmp_path / "random")
    assert tokens_per_step(target, tmp_path / "random") < 1.1
    result = train(options(target, data, tmp_path / "out", loss=loss, max_steps=400, lr=3e-3))
    assert result.last["eval_top1"][0] > 0.5
    assert tokens_per_step(target, tmp_path / "out") > 2


def test_shuffled_text_cannot_be_learnt(tmp_path, target, data):
    texts = torch.stack(load_dataset(data).tokens).long()
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(texts.shape, generator=generator).argsort(1)
    shuffled = write_dataset(tmp_path / "shuffled", texts.gather(1, order))
    losses = [
        train(options(target, d, tmp_path / str(i), loss="hard", max_steps=150, lr=3e-3))
        .last["eval_loss"]
        for i, d in enumerate((data, shuffled))
    ]  # fmt: skip
    assert losses[0] < losses[1] - 1.5


SHAPES = {
    "shared": {},
    "tuned": {"head": "tuned"},
    "own": {"head": "own", "exit_dim": 96},
    "apple": {"head": "own", "exit_dim": 128, "loss": "hard"},
    "cut": {"draft_vocab_size": 100, "blocks": 0},
    "sum": {"rnn": False, "offsets": 2},
    "bf16": {"bf16": True},
    "decay": {"offset_decay": 0.5},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_and_loads(tmp_path, target, data, shape):
    fields = {"max_steps": 20, **SHAPES[shape]}
    result = train(options(target, data, tmp_path / "out", log_every=5, **fields))
    lines = log.read_log(tmp_path / "out" / "training")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
    tables = load_file(target / "model.safetensors")
    drafter = load_drafter(tmp_path / "out", embedding=tables["model.embed_tokens.weight"],
                           lm_head=tables["lm_head.weight"])  # fmt: skip
    assert drafter.config.draft_vocab_size == fields.get("draft_vocab_size", 320)
    assert (result.coverage < 1) == ("draft_vocab_size" in fields)
    assert drafter.config.defaults == ({"draft_length": 2} if shape == "sum" else {})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["target"] == "target"
    assert drafter.config.target == of_directory(target)


def test_offsets_weigh_less_and_less_and_as_much_in_all():
    torch.testing.assert_close(offset_weights(3, 0.5), torch.tensor([12.0, 6.0, 3.0]) / 7)
    assert offset_weights(5, 1.0).tolist() == [1.0] * 5


def test_offsets_without_weight_learn_nothing(tmp_path, target, data):
    """The first offset's weight alone: the recurrent weights, which it does not use, stay."""
    start = {}
    for name, decay in (("alone", 1e-12), ("all", 1.0)):
        fields = {"max_steps": 5, "offsets": 3, "offset_decay": decay}
        train(options(target, data, tmp_path / name, **fields))
        start[name] = load_file(tmp_path / name / "model.safetensors")["rnn_u.weight"]
    fields = {"max_steps": 5, "offsets": 1}
    train(options(target, data, tmp_path / "one", **fields))
    one = load_file(tmp_path / "one" / "model.safetensors")["rnn_u.weight"]
    torch.testing.assert_close(start["alone"], one, atol=1e-4, rtol=0)
    assert (start["all"] - one).abs().max() > 1e-3


@pytest.mark.parametrize("width, kind", [(16, "shared"), (16, "own"), (24, "own"), (32, "own")])
def test_the_exported_drafter_computes_what_was_trained(width, kind):
    torch.manual_seed(0)
    config = DrafterConfig(vocab_size=20, hidden_size=16, exit_dim=width, num_draft_layers=2,
                           rnn=True, draft_vocab_size=20, shared_head=kind == "shared")  # fmt: skip
    states = torch.randn(50, 16) * torch.linspace(0.1, 12, 16) + torch.linspace(-3, 3, 16)
    model = TrainableDrafter(config, torch.randn(20, 16) * 0.1, torch.randn(20, width), kind,
                             states)  # fmt: skip
    tokens = torch.randint(20, (7, 3))
    expected = model(states[:7], tokens) @ model.head.T
    drafter = model.export(None, torch.float32)
    drafter.embedding = model.drafter.embedding
    state = drafter.initial_state(7)
    for i in range(3):
        logits, state = drafter(states[:7], tokens[:, i], state)
        torch.testing.assert_close(logits, expected[i], rtol=1e-4, atol=1e-3)


class Stop(Exception):
    pass


@pytest.mark.parametrize("head, cache", [("shared", True), ("tuned", False)])
def test_resuming_is_exact_to_the_bit(tmp_path, target, data, head, cache):
    # Parts of groups, ends of epochs and an interruption between two checkpoints.
    fields = {"head": head, "max_steps": 60, "save_every": 7, "log_every": 1, "eval_every": 20}
    fields["cache"] = cache
    train(options(target, data, tmp_path / "whole", **fields))

    def stop(done, total, line):
        if done == 45:
            raise Stop

    with pytest.raises(Stop):
        train(options(target, data, tmp_path / "parts", **fields), stop)
    torch.manual_seed(12345)
    torch.rand(3)
    train(options(target, data, tmp_path / "parts", resume=True, **fields))
    whole, parts = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = []
    for name in ("whole", "parts"):
        lines = log.read_log(tmp_path / name / "training")
        logs.append([{k: v for k, v in line.items() if k != "positions_per_second"}
                     for line in lines])  # fmt: skip
    assert logs[0] == logs[1]


def test_cached_hidden_states_are_the_computed_ones(target, data):
    dataset = load_dataset(data)
    frozen, cache = Target(target, "float32", torch.device("cpu")), {}
    for members in ([3, 5], [5, 7]):
        cached = make_group(frozen, dataset, members, offsets=3, cache=cache)
        computed = make_group(frozen, dataset, members, offsets=3)
        torch.testing.assert_close(cached.hidden, computed.hidden, rtol=1e-4, atol=1e-4)
    assert sorted(cache) == [3, 5, 7]


def test_the_seed_decides(tmp_path, target, data):
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        train(options(target, data, tmp_path / str(i), max_steps=3, seed=seed))
        weights.append(load_file(tmp_path / str(i) / "model.safetensors")["rnn_u.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_older_run_is_not_overwritten_and_not_mixed(tmp_path, target, data):
    out = tmp_path / "out"
    train(options(target, data, out, max_steps=2))
    with pytest.raises(TrainingError, match="already holds a drafter or a run; give --resume"):
        train(options(target, data, out, max_steps=2))
    with pytest.raises(TrainingError, match="had 'lr' 0.001, now it is 0.002; resume with the"):
        train(options(target, data, out, max_steps=2, lr=2e-3, resume=True))
    other = write_dataset(tmp_path / "other", torch.randint(256, (20, 48)))
    with pytest.raises(TrainingError, match="was on other data"):
        train(options(target, other, out, max_steps=2, resume=True))
    (out / "training" / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(TrainingError, match="checkpoint.pt' cannot be read"):
        train(options(target, data, out, max_steps=2, resume=True))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, target, data, monkeypatch):
    import errno

    fields = {"max_steps": 6, "save_every": 3}
    real, count = os.fsync, []

    def full(fd):
        count.append(fd)
        if len(count) > 2:  # options.json and the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TrainingError, match="checkpoint.pt' was not written.*the disk is full"):
        train(options(target, data, tmp_path / "out", **fields))
    monkeypatch.undo()
    saved = torch.load(tmp_path / "out" / "training" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3
    assert train(options(target, data, tmp_path / "out", resume=True, **fields)).steps == 6


def test_heads_that_need_the_targets_width(tmp_path, target, data):
    with pytest.raises(TrainingError, match="--head shared needs --exit-dim 64"):
        train(options(target, data, tmp_path / "out", exit_dim=32))


def test_not_a_target(tmp_path, data):
    with pytest.raises(TrainingError, match="not a directory with config.json"):
        train(options(tmp_path / "none", data, tmp_path / "out"))


def test_every_position_is_seen_once_an_epoch_by_some_process():
    anchors, lengths = [3, 5, 2, 8, 4, 6], [10] * 6
    seen = []
    schedules = [
        Schedule(range(6), anchors, lengths, group_tokens=10, batch_size=4, seed=1, rank=r, world=2)
        for r in range(2)
    ]
    counts = [len(schedule.epoch(0)) for schedule in schedules]
    assert counts[0] == counts[1]
    # What one process has kept of a sequence serves it again: no sequence changes hands.
    shares = [{i for e in range(5) for p in s.epoch(e) for i in p.members} for s in schedules]
    assert shares == [{0, 2, 4}, {1, 3, 5}]
    groups = [{p.group for p in s.epoch(0)} for s in schedules]
    assert not groups[0] & groups[1]
    # Both come to a new group, for whose hidden states they wait, at the same step.
    starts = [[p.part for p in s.epoch(0)] for s in schedules]
    assert starts[0] == starts[1]
    whole = Schedule(range(6), anchors, lengths, group_tokens=20, batch_size=4, seed=1)
    for place in whole.epoch(0):
        total = sum(anchors[i] for i in place.members)
        seen += [(place.group, at) for at in whole.positions(place, total).tolist()]
    assert len(seen) == len(set(seen)) == sum(anchors)
    assert whole.steps(2.5) == sum(len(whole.epoch(e)) for e in (0, 1)) + round(
        0.5 * len(whole.epoch(2))
    )
    several = whole.places(0)
    listed = [next(several) for _ in range(12)]
    later = whole.places(7)
    assert [next(later) for _ in range(5)] == listed[7:]
    assert listed[0].members != listed[len(whole.epoch(0))].members or len(anchors) == 1


def test_a_step_takes_short_runs_from_all_over_a_group():
    schedule = Schedule([0], [400], [402], group_tokens=500, batch_size=40, seed=1)
    places = schedule.epoch(0)
    assert len(places) == 10
    taken = [schedule.positions(place, 400) for place in places]
    assert sorted(torch.cat(taken).tolist()) == list(range(400))
    for at in taken:
        runs = at.view(-1, RUN)
        assert (runs == runs[:, :1] + torch.arange(RUN)).all()
        assert at.max() - at.min() > 200


@pytest.mark.slow
def test_two_processes_train_one_drafter(tmp_path, target, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "vllm_redrafter.cli", "train", "--target", target, "--data", data,
               "--out", tmp_path / "out", "--max-steps", "12", "--device", "cpu", "--no-plot",
               "--group-tokens", "1024"]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert load_drafter(tmp_path / "out", lm_head=torch.zeros(320, 64)).config.shared_head


def test_process_groups_of_the_caller_stay():
    """In a process of its own: an engine's groups must not end with a training run beside it."""
    code = """
import tempfile, torch.distributed as dist
from vllm_redrafter.training.train import _processes
store = tempfile.mkdtemp() + "/store"
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
with _processes() as found:
    assert found == (0, 1, None), found
assert dist.is_initialized()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("WORLD_SIZE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr


def test_the_command_with_a_yaml_file(tmp_path, target, data, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"target: {target}\ndata: {data}\nmax-steps: 4\nlr: 1e-3\nplot: false\n")
    arguments = ["train", "--config", str(config), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--max-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "after 2 steps" in out and "vllm serve" in out and "100.0%" in out


def test_curves(tmp_path):
    import matplotlib  # noqa: F401 - the extra `train`, which scripts/test.sh installs

    record = log.Log(tmp_path, 0)
    record.write({"step": 1, "loss": 3.0, "top1": [0.1, 0.2]})
    record.write({"step": 2, "loss": 2.0, "top1": [0.2, 0.3], "eval_loss": 2.5,
                  "eval_top1": [0.1, 0.1]})  # fmt: skip
    assert log.plot(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_plugin_and_the_help_load_nothing_of_this():
    code = (
        "import sys, vllm_redrafter.plugin\n"
        "assert not any(name.startswith('vllm_redrafter.training') for name in sys.modules)\n"
        "from vllm_redrafter import cli\n"
        "for command in ('data', 'train', 'eval'):\n"
        "    try: cli.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'vllm', 'transformers', 'rich', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("--draft-vocab-size", "--teacher", "--temperatures", "--config"):
        assert (name in done.stdout) == (name != "--teacher")
