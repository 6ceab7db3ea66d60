# SPDX-License-Identifier: Apache-2.0
"""`train --init`: a run that starts from a finished drafter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_random_drafter
from training_cases import tokens_per_step

from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.model import TrainableDrafter
from vllm_redrafter.training.options import TrainOptions
from vllm_redrafter.training.train import train


def options(target, data, out, **fields) -> TrainOptions:
    usual = {"batch_size": 256, "group_tokens": 2048, "save_dtype": "float32", "plot": False}
    return TrainOptions(str(target), str(data), str(out), **{**usual, **fields})


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("width, kind", [(16, "shared"), (16, "tuned"), (24, "own"), (32, "own")])
@pytest.mark.parametrize("more", [0, 2])
def test_taking_a_drafter_undoes_its_export(width, kind, more):
    torch.manual_seed(0)
    states = torch.randn(50, 16) * torch.linspace(0.1, 12, 16) + torch.linspace(-3, 3, 16)
    embedding, head = torch.randn(20, 16) * 0.1, torch.randn(20, width)

    def trainable(blocks, sample):
        config = DrafterConfig(vocab_size=20, hidden_size=16, exit_dim=width, rnn=True,
                               num_draft_layers=blocks, draft_vocab_size=20,
                               shared_head=kind == "shared")  # fmt: skip
        return TrainableDrafter(config, embedding, head, kind, sample)

    first = trainable(2, states)
    # Other data, other units: they change nothing either.
    second = trainable(2 + more, states * 1.7 + 0.3)
    tokens = torch.randint(20, (7, 3))
    expected = first(states[:7], tokens) @ first.head.T
    before = second(states[:7], tokens) @ second.head.T
    assert (before - expected).abs().max() > 0.1
    second.take(first.export(None, torch.float64))
    torch.testing.assert_close(
        second(states[:7], tokens) @ second.head.T, expected, rtol=1e-4, atol=1e-3
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, target, data):
    out = tmp_path_factory.mktemp("trained") / "drafter"
    train(options(target, data, out, max_steps=200, lr=3e-3, draft_vocab_size=100))
    return out


def test_it_goes_on_from_there(tmp_path, target, data, trained):
    still = options(target, data, tmp_path / "still", init=str(trained), max_steps=1, lr=1e-12)
    train(still)
    before, after = weights(trained), weights(tmp_path / "still")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4)
    fields = {"max_steps": 60, "lr": 1e-3, "draft_vocab_size": 100}
    fresh = train(options(target, data, tmp_path / "fresh", **fields))
    more = train(options(target, data, tmp_path / "more", init=str(trained), **fields))
    assert more.last["eval_loss"] < fresh.last["eval_loss"] - 0.2


def test_more_blocks_start_as_they_were_and_learn(tmp_path, target, data, trained):
    fields = {"init": str(trained), "blocks": 4}
    train(options(target, data, tmp_path / "still", max_steps=1, lr=1e-12, **fields))
    assert tokens_per_step(target, tmp_path / "still") == tokens_per_step(target, trained)
    train(options(target, data, tmp_path / "on", max_steps=5, lr=1e-3, **fields))
    assert weights(tmp_path / "on")["lm_head.3.linear.weight"].abs().max() > 1e-4


def test_the_draft_vocabulary_may_change_with_the_targets_head(tmp_path, target, data, trained):
    out = tmp_path / "out"
    train(options(target, data, out, init=str(trained), draft_vocab_size=150, max_steps=1))
    assert len(weights(out)["draft_vocab"]) == 150


def test_a_head_of_its_own_keeps_its_rows(tmp_path, target, data):
    fields = {"head": "own", "max_steps": 2, "draft_vocab_size": 80}
    train(options(target, data, tmp_path / "own", exit_dim=48, **fields))
    fields |= {"draft_vocab_size": None, "lr": 1e-12, "init": str(tmp_path / "own")}
    train(options(target, data, tmp_path / "on", **fields))
    before, after = weights(tmp_path / "own"), weights(tmp_path / "on")
    assert torch.equal(before["draft_vocab"], after["draft_vocab"])
    torch.testing.assert_close(after["lm_head.2.weight"], before["lm_head.2.weight"])


def test_resuming_is_exact_here_too(tmp_path, target, data, trained):
    fields = {"init": str(trained), "max_steps": 6, "save_every": 3, "lr": 1e-3}

    class Stop(Exception):
        pass

    def stop(done, total, line):
        if done == 4:
            raise Stop

    train(options(target, data, tmp_path / "whole", **fields))
    with pytest.raises(Stop):
        train(options(target, data, tmp_path / "out", log_every=1, **fields), stop)
    train(options(target, data, tmp_path / "out", resume=True, log_every=1, **fields))
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head": "own"}, "shares the target's head; give --head shared or tuned"),
        ({"rnn": False}, "has a recurrent cell; give --rnn"),
        ({"exit_dim": 32}, "--exit-dim is 32, but the drafter in '.*' has 64"),
        ({"blocks": 1}, "--blocks is 1, but the drafter in '.*' has 2"),
        ({"init": "nowhere"}, "'nowhere'"),
    ],
)
def test_what_does_not_fit(tmp_path, target, data, trained, fields, message):
    with pytest.raises(TrainingError, match=message):
        train(options(target, data, tmp_path / "out", **{"init": str(trained), **fields}))


def test_another_targets_drafter(tmp_path, target, data):
    write_random_drafter(tmp_path / "other", vocab_size=200, draft_vocab_size=200)
    with pytest.raises(TrainingError, match="vocab_size 200, but the target has 320"):
        train(options(target, data, tmp_path / "out", init=str(tmp_path / "other"), head="own"))


def test_a_head_that_sharing_would_throw_away(tmp_path, target, data):
    write_random_drafter(tmp_path / "apple")
    with pytest.raises(TrainingError, match="has a head of its own"):
        train(options(target, data, tmp_path / "out", init=str(tmp_path / "apple")))
