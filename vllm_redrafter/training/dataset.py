# SPDX-License-Identifier: Apache-2.0
"""What a drafter is trained on: sequences of tokens, with or without their hidden states.

Two sources: shards and a manifest, as `vllm-redrafter data` writes them, and directories of
``hs_{i}.safetensors`` files as vllm-project/speculators writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import sha256

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "vllm-redrafter-data", 1


@dataclass(frozen=True)
class Dataset:
    """Sequences in memory, hidden states (where there are any) on disk.

    Attributes:
        tokens: per sequence, ``[n]`` int32.
        answer: per sequence, ``[n]`` bool: the tokens that the target said.
        hidden: sequence number -> ``[n, H]``, the stored last hidden states, or None: recompute.
            Rows that no anchor needs may be zeros. None: nothing is stored.
        manifest: what `data` recorded; {} for hidden-state files.
    """

    tokens: list[Tensor]
    answer: list[Tensor]
    manifest: dict[str, Any]
    hidden: Callable[[int], Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def load_dataset(directory: str | Path, max_length: int | None = None) -> Dataset:
    """Read a dataset directory of either kind; sequences are cut to ``max_length``.

    Raises:
        TrainingError: not a dataset, a damaged shard, or nothing in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise TrainingError(
            f"the dataset directory '{directory}' does not exist; make one with "
            "`vllm-redrafter data`."
        )
    if (directory / MANIFEST).is_file():
        dataset = _load_shards(directory, max_length)
    else:
        files = hidden_state_files(directory)
        if not files:
            raise TrainingError(
                f"'{directory}' has neither {MANIFEST} nor hs_*.safetensors; give a directory that "
                "`vllm-redrafter data` wrote, or one of hidden states."
            )
        dataset = _load_hidden_states(files, max_length)
    if not len(dataset):
        raise TrainingError(f"the dataset in '{directory}' holds no sequences; make it anew.")
    return dataset


def join(datasets: Sequence[Dataset]) -> Dataset:
    """One dataset of the sequences of several, in order; its manifest is the first one's."""
    if len(datasets) == 1:
        return datasets[0]
    places = [(dataset, i) for dataset in datasets for i in range(len(dataset))]

    def hidden(number: int) -> Tensor | None:
        dataset, i = places[number]
        return None if dataset.hidden is None else dataset.hidden(i)

    return Dataset(
        [tokens for dataset in datasets for tokens in dataset.tokens],
        [answer for dataset in datasets for answer in dataset.answer],
        datasets[0].manifest,
        None if all(dataset.hidden is None for dataset in datasets) else hidden,
    )


def check_fits(dataset: Dataset, vocab_size: int, tokenizer_sha256: str | None, where: str) -> None:
    """Raise TrainingError unless the tokens are those of this target.

    Args:
        tokenizer_sha256: of the target, None when it has no tokenizer; then sizes must do.
    """
    recorded = dataset.manifest.get("tokenizer_sha256")
    if recorded and tokenizer_sha256 and recorded != tokenizer_sha256:
        raise TrainingError(
            f"the dataset in '{where}' was made with another tokenizer (target "
            f"{dataset.manifest.get('target')!r}); use that target, or make the data anew."
        )
    size = dataset.manifest.get("vocab_size")
    if size is not None and size != vocab_size:
        raise TrainingError(
            f"the dataset in '{where}' was made with a vocabulary of {size}, but the target has "
            f"{vocab_size}; use the target that made it."
        )
    top = max(int(tokens.max()) for tokens in dataset.tokens)
    if top >= vocab_size:
        raise TrainingError(
            f"the dataset in '{where}' holds token {top}, but the target's vocabulary has "
            f"{vocab_size}; use the target that made it."
        )


def read_manifest(directory: Path) -> dict[str, Any]:
    """``manifest.json`` of a dataset; raises TrainingError when it is not one of ours."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        fits = manifest["format"] == FORMAT and manifest["version"] == FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"'{path}' is not a dataset's manifest ({error}); give another directory."
        ) from error
    if not fits:
        raise TrainingError(
            f"'{path}' has format {manifest['format']!r} version {manifest['version']!r}, not "
            f"{FORMAT!r} version {FORMAT_VERSION}; make the data anew."
        )
    return manifest


def read_shard(directory: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """One shard's tensors, checked against the manifest's hash.

    Raises:
        TrainingError: missing or changed.
    """
    return _checked(directory / entry["file"], entry["sha256"])


def read_states(directory: Path, entry: dict[str, Any]) -> Tensor:
    """``[A, H]``, one shard's hidden states, checked like the shard."""
    return _checked(directory / entry["states"], entry["states_sha256"])["states"]


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
    return load_bytes(data)


def shard_texts(shard: dict[str, Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Of every sequence of a shard its ids ``[n]`` int32, and how many of them are the prompt."""
    lengths = shard["offsets"].diff().tolist()
    yield from zip(shard["tokens"].split(lengths), shard["prompt_lengths"].tolist(), strict=True)


def _load_shards(directory: Path, max_length: int | None) -> Dataset:
    manifest = read_manifest(directory)
    tokens, answer = [], []
    # Per sequence: file and first row of its states, None where there are none.
    stored: list[tuple[Path, int] | None] = []
    for entry in sorted(manifest["shards"], key=lambda entry: entry["file"]):
        path = directory / entry["states"] if "states" in entry else None
        row = 0
        for ids, prompt in shard_texts(read_shard(directory, entry)):
            stored.append(None if path is None else (path, row))
            row += len(ids) - prompt
            ids = ids[:max_length]
            tokens.append(ids)
            answer.append(torch.arange(len(ids)) >= prompt)
        if path is not None:
            _check_states(path, row)

    def hidden(number: int) -> Tensor | None:
        place = stored[number]
        if place is None:
            return None
        path, row = place
        said = int(answer[number].sum())
        with _opened(path) as file:
            rows = file.get_slice("states")[row : row + said]
        # Each answer token's row is the state of the token before it.
        states = rows.new_zeros(len(tokens[number]), rows.shape[1])
        first = len(states) - said - 1
        states[first : first + said] = rows
        return states

    return Dataset(tokens, answer, manifest, hidden if any(stored) else None)


def _check_states(path: Path, rows: int) -> None:
    """Raise TrainingError unless a shard's states are there, one per answer token."""
    with _opened(path) as file:
        found = file.get_slice("states").get_shape() if "states" in file.keys() else []
    if len(found) != 2 or found[0] != rows:
        raise TrainingError(
            f"'{path}' holds states of shape {list(found)}, but its shard has {rows} answer "
            "tokens; run `vllm-redrafter data` with the same options again to make them anew."
        )


def hidden_state_files(directory: Path) -> list[Path]:
    """``hs_{i}.safetensors`` in the order of their numbers."""
    found = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := re.fullmatch(r"hs_(\d+)\.safetensors", path.name))
    }
    return [found[number] for number in sorted(found)]


def _load_hidden_states(files: list[Path], max_length: int | None) -> Dataset:
    """``token_ids [n]``, ``hidden_states [n, layers, H]``, optionally ``loss_mask [n]``."""
    tokens, answer = [], []
    for path in files:
        with _opened(path) as file:
            names = set(file.keys())
            if not {"token_ids", "hidden_states"} <= names:
                raise TrainingError(
                    f"'{path}' holds {', '.join(sorted(names)) or 'nothing'}, not token_ids and "
                    "hidden_states; remove it or give another directory."
                )
            ids = file.get_tensor("token_ids").flatten().to(torch.int32)
            shape = file.get_slice("hidden_states").get_shape()
            if len(shape) != 3 or shape[0] != len(ids):
                raise TrainingError(
                    f"'{path}': hidden_states has shape {list(shape)}, but [{len(ids)}, layers, "
                    "hidden_size] is needed for its token_ids; write the file again."
                )
            mask = torch.ones(len(ids), dtype=torch.bool)
            if "loss_mask" in names:
                mask = file.get_tensor("loss_mask").flatten().bool()
        tokens.append(ids[:max_length])
        answer.append(mask[:max_length])

    def hidden(number: int) -> Tensor:
        with _opened(files[number]) as file:
            # The last slot is the last layer; the others are for drafters of other kinds.
            return file.get_slice("hidden_states")[: len(tokens[number])][:, -1]

    return Dataset(tokens, answer, {}, hidden)


class _opened:
    """``safe_open`` whose failures name the file and the cure."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.file = safe_open(self.path, framework="pt")
            return self.file.__enter__()
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"'{self.path}' cannot be read ({error}); write or copy it again."
            ) from error

    def __exit__(self, *exc: Any) -> None:
        self.file.__exit__(*exc)
