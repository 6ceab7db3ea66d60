# SPDX-License-Identifier: Apache-2.0
"""What a drafter is trained on: sequences of tokens, with or without their hidden states.

Two sources: shards and a manifest, as `vllm-redrafter data` writes them, and directories of
``hs_{i}.safetensors`` files as vllm-project/speculators writes them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_redrafter.drafter.checkpoint import WEIGHT_DTYPES
from vllm_redrafter.reading import one_line, shown
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.manifest import MANIFEST, read_manifest
from vllm_redrafter.training.shards import read_shard, shard_texts

_LARGEST_ID = 2**31 - 1


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
            f"{shown(dataset.manifest.get('target'))}); use that target, or make the data anew."
        )
    size = dataset.manifest.get("vocab_size")
    if size is not None and size != vocab_size:
        raise TrainingError(
            f"the dataset in '{where}' was made with a vocabulary of {size}, but the target has "
            f"{vocab_size}; use the target that made it."
        )
    top = max((int(tokens.max()) for tokens in dataset.tokens if len(tokens)), default=0)
    if top >= vocab_size:
        raise TrainingError(
            f"the dataset in '{where}' holds token {top}, but the target's vocabulary has "
            f"{vocab_size}; use the target that made it."
        )


def _load_shards(directory: Path, max_length: int | None) -> Dataset:
    manifest = read_manifest(directory)
    tokens, answer = [], []
    # Per sequence: file and first row of its states, None where there are none.
    stored: list[tuple[Path, int] | None] = []
    widths: set[int] = set()
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
            widths.add(_check_states(path, row))
    if len(widths) > 1:
        raise TrainingError(
            f"'{directory}' holds states of different sizes, {sorted(widths)}; they are of several "
            "targets: make the data anew."
        )

    def hidden(number: int) -> Tensor | None:
        place = stored[number]
        if place is None:
            return None
        path, row = place
        said = int(answer[number].sum())
        with _opened(path) as file:
            rows = _finite(file.get_slice("states")[row : row + said], path)
        # Each answer token's row is the state of the token before it.
        states = rows.new_zeros(len(tokens[number]), rows.shape[1])
        first = len(states) - said - 1
        states[first : first + said] = rows
        return states

    return Dataset(tokens, answer, manifest, hidden if any(stored) else None)


def _check_states(path: Path, rows: int) -> int:
    """Their size H; raises TrainingError unless a shard's states are there, one per answer token.
    """
    with _opened(path) as file:
        found, dtype = [], torch.float32
        if "states" in file.keys():
            found, dtype = file.get_slice("states").get_shape(), _dtype(file, "states")
    if len(found) != 2 or found[0] != rows or found[1] < 1 or dtype not in WEIGHT_DTYPES:
        raise TrainingError(
            f"'{path}' holds {str(dtype).removeprefix('torch.')} states of shape {list(found)}, "
            f"but its shard has {rows} answer tokens; run `vllm-redrafter data` with the same "
            "options again to make them anew."
        )
    return found[1]


def _dtype(file: Any, name: str) -> torch.dtype:
    return file.get_tensor(name).dtype


def _finite(states: Tensor, path: Path) -> Tensor:
    """``states``; raises TrainingError where one is not finite, as it would spoil all weights."""
    if not states.isfinite().all():
        raise TrainingError(
            f"'{path}' holds hidden states that are not finite; write or copy it again, in "
            "bfloat16 or float32 if it was written in float16."
        )
    return states


def hidden_state_files(directory: Path) -> list[Path]:
    """``hs_{i}.safetensors`` in the order of their numbers."""
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := re.fullmatch(r"hs_([0-9]+)\.safetensors", path.name))
    ]
    return [path for _, path in sorted(found)]


def _load_hidden_states(files: list[Path], max_length: int | None) -> Dataset:
    """``token_ids [n]``, ``hidden_states [n, layers, H]``, optionally ``loss_mask [n]``."""
    tokens, answer = [], []
    widths: set[int] = set()
    for path in files:
        ids, mask, width = _hidden_state_file(path)
        tokens.append(ids[:max_length])
        answer.append(mask[:max_length])
        widths.add(width)
    if len(widths) > 1:
        raise TrainingError(
            f"'{files[0].parent}' holds hidden states of different sizes, {sorted(widths)}; they "
            "are of several targets: give a directory for each."
        )

    def hidden(number: int) -> Tensor:
        with _opened(files[number]) as file:
            # The last slot is the last layer; the others are for drafters of other kinds.
            rows = file.get_slice("hidden_states")[: len(tokens[number])][:, -1]
            return _finite(rows, files[number]).clone()

    return Dataset(tokens, answer, {}, hidden)


def _hidden_state_file(path: Path) -> tuple[Tensor, Tensor, int]:
    """Of one file the ids ``[n]`` int32, the answer's mask ``[n]`` bool, and the states' size H."""
    with _opened(path) as file:
        names = set(file.keys())
        if not {"token_ids", "hidden_states"} <= names:
            raise TrainingError(
                f"'{path}' holds {shown(sorted(names)) if names else 'nothing'}, not token_ids "
                "and hidden_states; remove it or give another directory."
            )
        ids = _token_ids(file.get_tensor("token_ids"), path)
        shape = file.get_slice("hidden_states").get_shape()
        if len(shape) != 3 or shape[0] != len(ids) or 0 in shape:
            raise TrainingError(
                f"'{path}': hidden_states has shape {list(shape)}, but [{len(ids)}, layers, "
                "hidden_size] is needed for its token_ids; write the file again."
            )
        dtype = _dtype(file, "hidden_states")
        if dtype not in WEIGHT_DTYPES:
            raise TrainingError(
                f"'{path}': hidden_states is {dtype}; write it as bfloat16, float16 or float32."
            )
        mask = torch.ones(len(ids), dtype=torch.bool)
        if "loss_mask" in names:
            mask = _loss_mask(file.get_tensor("loss_mask"), len(ids), path)
    return ids, mask, shape[2]


def _token_ids(stored: Tensor, path: Path) -> Tensor:
    """The ids as int32 in memory of their own; raises TrainingError for what is no token id."""
    if stored.is_floating_point() or stored.is_complex() or stored.dtype is torch.bool:
        raise TrainingError(
            f"'{path}': token_ids is {stored.dtype}; token ids must be stored as integers."
        )
    ids = stored.flatten().to(torch.int64)
    if not len(ids):
        raise TrainingError(f"'{path}' has no token_ids in it; remove it.")
    if ids.min() < 0 or ids.max() > _LARGEST_ID:
        raise TrainingError(
            f"'{path}': token_ids holds {int(ids.min())} to {int(ids.max())}; token ids are from "
            f"0 to {_LARGEST_ID}: write the file again."
        )
    return ids.to(torch.int32)


def _loss_mask(stored: Tensor, length: int, path: Path) -> Tensor:
    mask = stored.flatten()
    if len(mask) != length or not ((mask == 0) | (mask == 1)).all():
        raise TrainingError(
            f"'{path}': loss_mask has shape {list(stored.shape)} and must hold 0 or 1 for each of "
            f"its {length} token_ids; write the file again."
        )
    return mask.bool()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """``safe_open`` whose failures, and those of reading, name the file and the cure."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"'{path}' cannot be read ({one_line(error)}); write or copy it again."
        ) from error
