# SPDX-License-Identifier: Apache-2.0
"""Where a target is, what is refused, and how many engines fit."""

import json

import pytest

from vllm_redrafter.bench.errors import BenchError
from vllm_redrafter.bench.models import (
    ENGINE_BYTES,
    cache_bytes,
    engine_bytes,
    engines_at_once,
    kv_bytes_per_token,
    locate_target,
)

CONFIG = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64,
          "num_key_value_heads": 2, "torch_dtype": "float32"}  # fmt: skip


def write(directory, config):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_directory(tmp_path):
    target = locate_target(str(write(tmp_path / "mine", CONFIG)))
    assert (target.name, target.model) == ("mine", str(tmp_path / "mine"))
    assert target.config["hidden_size"] == 64
    several = locate_target(str(write(tmp_path / "parts", {"text_config": CONFIG})))
    assert several.config == CONFIG


@pytest.mark.parametrize(("name", "config", "says"), [
    ("nothere", None, "does not exist; give a model's directory, or its name"),
    ("drafter", {"model_type": "redrafter"}, "is a drafter, not a target"),
    ("empty", "none", "is no model"),
])  # fmt: skip
def test_what_is_refused(tmp_path, name, config, says):
    if config == "none":
        (tmp_path / name).mkdir()
    elif config:
        write(tmp_path / name, config)
    with pytest.raises(BenchError, match=says):
        locate_target(str(tmp_path / name))


def test_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    def download(name, allow_patterns):
        assert name == "owner/model" and "*.safetensors" not in allow_patterns
        return str(tmp_path / "mine")

    write(tmp_path / "mine", CONFIG)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    target = locate_target("owner/model")
    assert (target.model, target.name, target.files) == ("owner/model", "model", tmp_path / "mine")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(BenchError, match="could not be downloaded .*; check its name"):
        locate_target("owner/model")


def test_the_cache_holds_the_largest_batch():
    # 2 layers, 2 heads of 16, keys and values, 2 bytes each: 256 bytes a token.
    assert kv_bytes_per_token(CONFIG, "bfloat16") == 256
    assert kv_bytes_per_token(CONFIG, "float32") == 512
    assert kv_bytes_per_token({**CONFIG, "head_dim": 32}, "bfloat16") == 512
    assert cache_bytes(CONFIG, "bfloat16", [[1] * 300], 700, 512) == 1 << 28
    assert cache_bytes(CONFIG, "bfloat16", [[1] * 300], 700, 4096) == 4096 * (300 + 700 + 256) * 256
    with pytest.raises(BenchError, match="give --kv-cache-bytes"):
        kv_bytes_per_token({"hidden_size": 3}, "bfloat16")


def test_engines_that_fit(tmp_path):
    target = locate_target(str(write(tmp_path / "mine", CONFIG)))
    (target.files / "model.safetensors").write_bytes(bytes(1000))
    assert engine_bytes(target, 50, "float32") == 1000 + 50 + ENGINE_BYTES
    assert engine_bytes(target, 50, "bfloat16") == 500 + 50 + ENGINE_BYTES
    assert [engines_at_once(10, available, 5) for available in (5, 25, 39, 80)] == [2, 2, 3, 5]
