# SPDX-License-Identifier: Apache-2.0
"""`convert` of damaged and hostile pickles: a sentence or a right drafter, never a large file."""

from __future__ import annotations

import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fuzz.mutate import WILD, spoilt
from fuzz.sentences import Outcomes
from vllm_redrafter.cli.convert import convert
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import DrafterError

APPLE = Path(__file__).resolve().parents[1] / "conformance" / "input_proj"
LARGEST = 1 << 20


@pytest.fixture
def source_dir(tmp_path):
    (tmp_path / "src").mkdir()
    shutil.copy(APPLE / "config.json", tmp_path / "src")
    return tmp_path / "src"


def other_weights(tensors, source: random.Random):
    """A state_dict with one entry of another kind."""
    tensors = dict(tensors)
    name = source.choice(sorted(tensors))
    tensor = tensors[name]
    endless: dict = {"weight": tensor}
    endless["again"] = endless
    kinds = (
        lambda: tensor.to_sparse(),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: torch.zeros(1).expand(tensor.shape),
        lambda: torch.zeros(1).expand(2**20, 2**20),
        lambda: tensor.to(source.choice((torch.complex64, torch.int32, torch.bool, torch.half))),
        lambda: tensor.t() if tensor.dim() == 2 else tensor[::2],
        lambda: torch.nn.Parameter(tensor),
        lambda: endless,
        lambda: source.choice(WILD),
        lambda: tensors[source.choice(sorted(tensors))],
    )
    key = source.choice((name, name, name, f"a.{name}", "lm_head." + "9" * 60 + ".weight", "x", 7))
    tensors[key] = source.choice(kinds)()
    if source.random() < 0.2:
        del tensors[name]
    return source.choice((lambda t: t, lambda t: {"state_dict": t}, lambda t: [t]))(tensors)


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_pickles(source_dir, tmp_path, count):
    source = random.Random(11)
    outcomes = Outcomes(DrafterError)
    tensors = load_file(APPLE / "model.safetensors")
    path, out = source_dir / "model.pt", tmp_path / "out"
    config = (source_dir / "config.json").read_bytes()
    for number in range(count):
        torch.save(other_weights(tensors, source), path)
        if source.random() < 0.3:
            path.write_bytes(spoilt(path.read_bytes(), source))
        (source_dir / "config.json").write_bytes(config)
        if source.random() < 0.3:
            (source_dir / "config.json").unlink()
        shutil.rmtree(out, ignore_errors=True)

        def case():
            convert(source_dir, out)
            load_drafter(out)

        outcomes.run(number, case)
        written = sum(file.stat().st_size for file in out.iterdir()) if out.exists() else 0
        assert written < LARGEST
    outcomes.check()


def test_an_expanded_tensor_is_refused(source_dir, tmp_path):
    """1.6 KB of pickle would become gigabytes."""
    tensors = load_file(APPLE / "model.safetensors")
    head = max(name for name in tensors if name.endswith(".weight") and "linear" not in name
               and name.startswith("lm_head"))  # fmt: skip
    tensors[head] = torch.zeros(1).expand(2**15, 2**15)
    torch.save(tensors, source_dir / "model.pt")
    (source_dir / "config.json").unlink()
    with pytest.raises(DrafterError, match="of which only .* are stored: some are expanded"):
        convert(source_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_checkpoint_is_refused(source_dir, tmp_path):
    """torch.save never compresses; a file that is compressed may hold a thousand times its size."""
    tensors = load_file(APPLE / "model.safetensors")
    torch.save({**tensors, "zeros": torch.zeros(1 << 18)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(source_dir / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(DrafterError, match="it is compressed, and"):
        convert(source_dir, tmp_path / "out")


def test_a_shared_head_takes_no_memory(source_dir, tmp_path):
    """Whatever the config says about the target's head, nothing of it is made or stored."""
    config = '{"model_type": "redrafter", "vocab_size": 2000000000, "hidden_size": 4, ' \
             '"exit_dim": 4, "num_draft_layers": 0, "shared_head": true}'  # fmt: skip
    (source_dir / "config.json").write_text(config)
    torch.save({"input_proj.weight": torch.ones(4, 8), "input_proj.bias": torch.ones(4)},
               source_dir / "model.pt")  # fmt: skip
    convert(source_dir, tmp_path / "out")
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < LARGEST
