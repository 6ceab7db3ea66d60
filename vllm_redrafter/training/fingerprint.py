# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of loaded targets, and of directories of which only a few rows are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_redrafter.drafter.config import read_json
from vllm_redrafter.drafter.fingerprint import Fingerprint, Values, sample
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.target import Target, tokenizer_sha256

# How models of Hugging Face name the two tables, behind whatever prefix.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output")


def of_target(target: Target, directory: str | Path) -> Fingerprint:
    """Of a target that was loaded from ``directory``."""
    sizes = target.vocab_size, target.hidden_size
    return Fingerprint(
        *sizes,
        num_hidden_layers=target.num_hidden_layers,
        tokenizer_sha256=tokenizer_sha256(directory),
        embedding=sample(target.embedding, *sizes),
        head=sample(target.head, *sizes),
    )


def of_directory(directory: str | Path) -> Fingerprint:
    """Of a directory with config.json and safetensors; reads a few rows of them.

    Raises:
        TrainingError: no such directory, or tables that are not where they usually are.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise TrainingError(
            f"the target '{directory}' is not a directory with config.json; give a local model "
            "directory."
        )
    config = read_json(directory / "config.json")
    text = config.get("text_config") or config
    sizes = text.get("vocab_size"), text.get("hidden_size")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise TrainingError(
            f"'{directory / 'config.json'}' does not say vocab_size and hidden_size; give a "
            "target's directory."
        )
    files = _tensor_files(directory)
    # Some kinds of models are tied where nothing is said.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    embedding = _sampled(files, _EMBEDDINGS, sizes)
    head = embedding if tied else _sampled(files, _HEADS, sizes)
    if head is None and tied is None:
        head = embedding
    if embedding is None or head is None:
        what = "input embedding" if embedding is None else "output head"
        raise TrainingError(
            f"no {what} was found among the safetensors in '{directory}', so the target cannot be "
            "told from others; leave --target out."
        )
    return Fingerprint(
        *sizes,
        num_hidden_layers=text.get("num_hidden_layers"),
        tokenizer_sha256=tokenizer_sha256(directory),
        embedding=embedding,
        head=head,
    )


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Names of all tensors, and the files that hold them."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); copy or download it again."
            ) from error
    return found


def _sampled(files: dict[str, Path], names: tuple[str, ...], sizes: Any) -> Values | None:
    """Of the first table that has one of these names and these sizes."""
    vocab_size, hidden_size = sizes
    for name, path in files.items():
        parts = name.split(".")
        if len(parts) < 2 or parts[-1] != "weight" or parts[-2] not in names:
            continue
        with safe_open(path, framework="pt") as file:
            rows = _Rows(file.get_slice(name))
            if rows.fits(vocab_size, hidden_size):
                return sample(rows, vocab_size, hidden_size)
    return None


class _Rows:
    """Rows of a table on disk, by id."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def fits(self, vocab_size: int, hidden_size: int) -> bool:
        """Whether it is a table of floats of these sizes, padding allowed."""
        shape = self._table.get_shape()
        return (
            len(shape) == 2
            and shape[0] >= vocab_size
            and shape[1] == hidden_size
            and self._table.get_dtype() in ("F64", "F32", "F16", "BF16")
        )

    def __getitem__(self, ids: Tensor) -> Tensor:
        return torch.cat([self._table[int(i) : int(i) + 1] for i in ids])
