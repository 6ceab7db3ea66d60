# SPDX-License-Identifier: Apache-2.0
"""Hidden states kept while the target answered: from an engine, to disk, into training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from engine_v1.tiny_target import write_target
from safetensors.torch import load_file
from training_cases import FakeEngine, write_dataset, write_prompts

from vllm_redrafter.training.data import generate_dataset
from vllm_redrafter.training.dataset import MANIFEST, join, load_dataset
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.generate import EngineProcess, Request, engine_env
from vllm_redrafter.training.options import DataOptions, TrainOptions
from vllm_redrafter.training.target import Target, with_finished_states
from vllm_redrafter.training.train import train


class KeepingEngine(FakeEngine):
    """Its answers come with the states that the target has behind them."""

    def __init__(self, target) -> None:
        super().__init__()
        self._target = Target(target, "float32", torch.device("cpu"))

    def generate(self, requests, seed):
        answers = super().generate(requests, seed)
        texts = [
            torch.tensor(request.prompt + answer.token_ids)
            for request, answer in zip(requests, answers, strict=True)
        ]
        return [
            replace(answer, states=states[len(request.prompt) - 1 : -1])
            for request, answer, states in zip(
                requests, answers, self._target.hidden(texts), strict=True
            )
        ]


def options(target, out, prompts, **fields) -> DataOptions:
    return DataOptions(str(target), str(out), str(prompts), shard_size=4, max_tokens=50,
                       max_model_len=200, hidden_states=True, **fields)  # fmt: skip


@pytest.fixture
def kept(tmp_path, target):
    prompts = write_prompts(tmp_path / "p.jsonl", 10)
    generate_dataset(options(target, tmp_path / "d", prompts), start=KeepingEngine(target).start)
    return tmp_path / "d"


def test_an_engine_gives_the_state_behind_every_token(tmp_path):
    """Prompts in chunks, and too few blocks for all requests: some are preempted and begin anew."""
    target = write_target(tmp_path / "target")
    kwargs = {"model": str(target), "dtype": "float32", "max_model_len": 160, "enforce_eager": True,
              "block_size": 32, "num_gpu_blocks_override": 10, "max_num_batched_tokens": 24,
              "max_num_seqs": 8, "disable_log_stats": True,
              "enable_prefix_caching": False}  # fmt: skip
    engine = EngineProcess(kwargs, engine_env(0, 1, []), capture=True)
    generator = torch.Generator().manual_seed(3)
    requests = [
        Request(torch.randint(90, (length,), generator=generator).tolist(), temperature, 40)
        for length, temperature in ((3, 0.0), (37, 0.9), (30, 0.0), (50, 0.0), (9, 0.9), (44, 0.0))
    ]
    try:
        answers = engine.generate(requests, 1)
        again = engine.generate(requests[:2], 1)
    finally:
        engine.stop()
    frozen = Target(target, "float32", torch.device("cpu"))
    for request, answer in [
        *zip(requests, answers, strict=True),
        *zip(requests[:2], again, strict=True),
    ]:
        text = torch.tensor(request.prompt + answer.token_ids)
        wanted = frozen.hidden([text])[0][len(request.prompt) - 1 : -1]
        assert answer.states.shape == wanted.shape
        torch.testing.assert_close(answer.states, wanted, rtol=1e-3, atol=1e-3)
        # One position off is another state.
        assert (answer.states[1:] - wanted[:-1]).abs().max() > 0.1


def test_states_come_back_at_their_positions(kept, target):
    dataset = load_dataset(kept)
    frozen = Target(target, "float32", torch.device("cpu"))
    assert len(dataset) == 10
    for i in (0, 5, 9):
        said = dataset.answer[i]
        needed = torch.cat([said[1:], torch.tensor([False])])
        wanted = frozen.hidden([dataset.tokens[i].long()])[0]
        torch.testing.assert_close(dataset.hidden(i)[needed], wanted[needed])
        assert not dataset.hidden(i)[~needed].any()
    assert with_finished_states(frozen, dataset) is dataset


def test_sequences_are_cut_with_their_states(kept):
    whole, cut = load_dataset(kept), load_dataset(kept, 40)
    at = int((~cut.answer[3]).sum()) - 1
    assert len(cut.tokens[3]) == 40
    assert torch.equal(cut.hidden(3)[at:-1], whole.hidden(3)[at:39])


def test_training_reads_what_it_would_compute(tmp_path, kept, target):
    plain = tmp_path / "plain"
    plain.mkdir()
    manifest = json.loads((kept / MANIFEST).read_text())
    for entry in manifest["shards"]:
        (plain / entry["file"]).write_bytes((kept / entry["file"]).read_bytes())
        del entry["states"], entry["states_sha256"]
    (plain / MANIFEST).write_text(json.dumps(manifest))
    weights = []
    for data in (kept, plain):
        out = tmp_path / f"out-{data.name}"
        train(TrainOptions(str(target), (str(data),), str(out), max_steps=5, plot=False,
                           batch_size=32, held_out=0))  # fmt: skip
        weights.append(load_file(out / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


def test_data_with_and_without_states_may_be_mixed(tmp_path, kept, target):
    other = write_dataset(tmp_path / "other", torch.randint(90, (6, 30)))
    both = join([load_dataset(other), load_dataset(kept)])
    assert both.hidden(5) is None and both.hidden(6).any()
    result = train(TrainOptions(str(target), (str(other), str(kept)), str(tmp_path / "out"),
                                max_steps=3, plot=False, batch_size=32, cache=True))  # fmt: skip
    assert result.steps == 3


def test_a_damaged_file_of_states_is_made_anew(tmp_path, kept, target):
    path = kept / "states-00001.safetensors"
    before = load_file(path)["states"].clone()  # not a view of the file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"states-00001.*write or copy it again"):
        load_dataset(kept)
    said = []
    prompts = tmp_path / "p.jsonl"
    engine = KeepingEngine(target)
    generate_dataset(options(target, kept, prompts), start=engine.start, say=said.append)
    assert len(engine.calls) == 1 and "it is made anew" in said[0]
    torch.testing.assert_close(load_file(path)["states"], before)


def test_states_of_another_number_of_tokens_are_refused(kept):
    states = kept / "states-00000.safetensors"
    states.write_bytes((kept / "states-00002.safetensors").read_bytes())
    with pytest.raises(TrainingError, match="answer tokens"):
        load_dataset(kept)
