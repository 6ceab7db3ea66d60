# SPDX-License-Identifier: Apache-2.0
"""The target of a benchmark: where it is, and how much memory an engine with it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.errors import BenchError
from vllm_redrafter.drafter.config import MODEL_TYPES, DrafterError, model_type_of, read_json
from vllm_redrafter.reading import one_line

# Beside weights and KV cache: Python, libraries, activations.
ENGINE_BYTES = 1 << 30
# Small files of a model on the hub: its configuration and its tokenizer.
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        model: what vLLM gets: a directory, or a name on the hub.
        files: a directory with its config.json and its tokenizer.
        name: for reports.
    """

    model: str
    files: Path
    name: str

    @property
    def config(self) -> dict[str, Any]:
        """config.json, of a model of several parts that of its text model."""
        config = read_json(self.files / "config.json")
        return config.get("text_config") or config


def locate_target(given: str) -> Target:
    """A local directory, or a repository of the hub, of which the small files are downloaded.

    Raises:
        BenchError: neither, or a drafter.
    """
    path = Path(given).expanduser()
    if model_type_of(path) in MODEL_TYPES:
        raise BenchError(
            f"'{given}' is a drafter, not a target; give the target first and then its drafter."
        )
    if path.is_dir():
        target = Target(str(path.resolve()), path.resolve(), path.resolve().name)
    elif given.count("/") == 1 and not given.startswith((".", "/", "~")):
        target = Target(given, _download(given), given.split("/")[1])
    else:
        raise BenchError(
            f"the target '{given}' does not exist; give a model's directory, or its name on the "
            "Hugging Face hub (owner/name)."
        )
    try:
        _ = target.config
    except DrafterError as error:
        raise BenchError(f"'{given}' is no model ({error}); give a model's directory.") from error
    return target


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_SMALL))
    except Exception as error:  # the library raises many kinds, all meaning: not available
        raise BenchError(
            f"the target '{name}' is no local directory and could not be downloaded "
            f"({one_line(error)}); check its name and the network, or give a model's directory."
        ) from error


def kv_bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    """Bytes that the KV cache takes for one token, all layers together.

    Args:
        config: of a target with attention in every layer.
        dtype: "float32", or a type of two bytes.

    Raises:
        BenchError: the config does not say its sizes.
    """
    try:
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads)
        return values * size * (4 if dtype == "float32" else 2)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BenchError(
            f"the target's config.json does not say how large a KV cache it needs ({error}); give "
            "--kv-cache-bytes."
        ) from error


def cache_bytes(
    config: dict[str, Any], dtype: str, prompts: Sequence[Sequence[int]], max_tokens: int, most: int
) -> int:
    """A KV cache for ``most`` requests at once, so that no engine ever has to preempt."""
    # Whole blocks, of at most 128 tokens, and room for drafts.
    longest = max(map(len, prompts)) + max_tokens + 2 * 128
    return max(1 << 28, most * longest * kv_bytes_per_token(config, dtype))


def engine_bytes(target: Target, kv_cache_bytes: int, dtype: str) -> int:
    """About what one engine takes; a model that is not here yet counts without its weights."""
    weights = 0
    for pattern in _WEIGHTS:
        weights = weights or sum(path.stat().st_size for path in target.files.glob(pattern))
    stored = str(target.config.get("dtype") or target.config.get("torch_dtype") or "")
    if (stored == "float32") != (dtype == "float32"):
        weights = 2 * weights if dtype == "float32" else weights // 2
    return weights + kv_cache_bytes + ENGINE_BYTES


def engines_at_once(each: int, available: int, most: int) -> int:
    """How many engines fit side by side; two at least, or there is nothing to compare.

    Args:
        each: bytes of one.
        available: bytes.
        most: engines that there are.
    """
    return max(2, min(most, available // max(each, 1)))


def available_bytes() -> int:
    """Memory for engines: of the GPU nine tenths, else what the system says is available."""
    if on_gpu():
        import torch

        return int(0.9 * torch.cuda.get_device_properties(0).total_memory)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def on_gpu() -> bool:
    """Whether engines will run on a GPU."""
    import torch

    return torch.cuda.is_available()
