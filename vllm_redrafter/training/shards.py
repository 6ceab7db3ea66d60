# SPDX-License-Identifier: Apache-2.0
"""A dataset's shards: read whole, compared with the manifest, and checked for what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor

from vllm_redrafter.reading import one_line
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import sha256

# What a shard holds (`data.shard_bytes`), besides the tokens per sequence.
_PER_SEQUENCE = {
    "prompt_lengths": torch.int32,
    "temperatures": torch.float32,
    "ended": torch.bool,
    "prompt_keys": torch.int64,
}


def read_shard(directory: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """One shard's tensors, see ``data.shard_bytes``.

    Args:
        entry: of the manifest, checked.

    Raises:
        TrainingError: missing, not what the manifest recorded, or impossible.
    """
    path = directory / entry["file"]
    shard = _checked(path, entry["sha256"])
    problem = _problem(shard)
    if problem:
        raise TrainingError(f"the shard '{path}' {problem}; make the data anew.")
    return shard


def read_states(directory: Path, entry: dict[str, Any]) -> Tensor:
    """``[A, H]``, one shard's hidden states, checked like the shard."""
    path = directory / entry["states"]
    states = _checked(path, entry["states_sha256"]).get("states")
    if states is None or states.dim() != 2:
        raise TrainingError(f"'{path}' holds no matrix `states`; make the data anew.")
    return states


def shard_texts(shard: dict[str, Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Of every sequence of a shard its ids ``[n]`` int32, and how many of them are the prompt."""
    lengths = shard["offsets"].diff().tolist()
    yield from zip(shard["tokens"].split(lengths), shard["prompt_lengths"].tolist(), strict=True)


def _checked(path: Path, wanted: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"the shard '{path}' cannot be read ({error.strerror}).") from error
    if sha256(data) != wanted:
        raise TrainingError(
            f"the shard '{path}' is not what the manifest recorded (sha256 differs); run "
            "`vllm-redrafter data` with the same options again: it makes this shard anew."
        )
    try:
        return load_bytes(data)
    except Exception as error:  # unknown types, for one, are KeyErrors
        raise TrainingError(
            f"the shard '{path}' is not safetensors ({one_line(error)})."
        ) from error


def _problem(shard: dict[str, Tensor]) -> str | None:
    """What is wrong with a shard, or None."""
    wanted = {"tokens": torch.int32, "offsets": torch.int64, **_PER_SEQUENCE}
    for name, dtype in wanted.items():
        if name not in shard:
            return f"lacks the tensor {name}"
        if shard[name].dtype != dtype or shard[name].dim() != 1:
            return f"has {name} of {shard[name].dtype} and shape {list(shard[name].shape)}"
    offsets, tokens, prompts = shard["offsets"], shard["tokens"], shard["prompt_lengths"]
    count = len(offsets) - 1
    if any(len(shard[name]) != count for name in _PER_SEQUENCE):
        return f"has {count + 1} offsets, which do not belong to its {len(prompts)} prompts"
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(tokens) or (lengths < 0).any():
        return f"has offsets that do not rise from 0 to its {len(tokens)} tokens"
    # Every text has a prompt and an answer.
    if ((prompts < 1) | (prompts >= lengths)).any():
        return "has prompts that are empty, or as long as their whole text"
    if (tokens < 0).any():
        return f"holds the token {int(tokens.min())}"
    temperatures = shard["temperatures"]
    if not (temperatures.isfinite() & (temperatures >= 0)).all():
        return "has a temperature below 0, or none at all"
    return None
