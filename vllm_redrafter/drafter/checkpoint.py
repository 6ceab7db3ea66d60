# SPDX-License-Identifier: Apache-2.0
"""Drafter directories: ``config.json`` and safetensors, Apple's or ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_redrafter.drafter.config import (
    APPLE_MODEL_TYPE,
    MODEL_TYPE,
    DrafterConfig,
    DrafterError,
    load_config,
    read_json,
)
from vllm_redrafter.drafter.fingerprint import FIELD
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.reading import is_file_name, one_line, shown

WEIGHTS_NAME = "model.safetensors"
DRAFT_VOCAB = "draft_vocab"

# Written by one of Apple's readers and used by no forward pass.
IGNORED_TENSORS = frozenset({"emb_norm.weight"})

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

# Of stored weights. Narrower floats come with scales, of which this format knows nothing.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_drafter(
    directory: str | Path,
    *,
    embedding: Tensor | None = None,
    lm_head: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Drafter:
    """Load a drafter and bind it to its target's tables.

    Args:
        directory: local folder with ``config.json`` and ``*.safetensors``.
        embedding: the target's input embedding table ``[>= vocab_size, hidden_size]``; needed
            before drafting, may be bound later through ``Drafter.embedding``.
        lm_head: the target's output head ``[>= vocab_size, hidden_size]``; needed only by a
            drafter with a shared head.
        dtype: of the drafter's weights and arithmetic; None keeps the checkpoint's.

    Returns:
        Drafter in evaluation mode, on the CPU.

    Raises:
        DrafterError: with one sentence that names the value and the cure.
    """
    directory = Path(directory)
    return build_drafter(
        load_config(directory),
        _read_tensors(directory),
        directory,
        embedding=embedding,
        lm_head=lm_head,
        dtype=dtype,
    )


def build_drafter(
    config: DrafterConfig,
    tensors: dict[str, Tensor],
    directory: Path,
    *,
    embedding: Tensor | None = None,
    lm_head: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Drafter:
    """``load_drafter`` of what was read already; ``directory`` goes into the messages.

    Args:
        tensors: by Apple's names, ``draft_vocab`` among them where there is one; emptied.
    """
    config = _with_rnn_from_tensors(config, tensors, directory)
    draft_vocab = _take_draft_vocab(config, tensors, directory)
    check_target_tables(config, embedding, lm_head, directory)
    _check_tensors(config, tensors, directory)
    if config.shared_head:
        if lm_head is None:
            raise DrafterError(
                f"The drafter in '{directory}' shares its output head with the target; pass the "
                "target's lm_head weight."
            )
        rows = lm_head[: config.vocab_size] if draft_vocab is None else lm_head[draft_vocab]
        weights_dtype = dtype or next(iter(tensors.values())).dtype
        tensors[_head_name(config)] = rows.detach().to(weights_dtype)

    with torch.device("meta"):
        drafter = Drafter(config)
    dtype = dtype or tensors[_head_name(config)].dtype
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    drafter.load_state_dict(tensors, assign=True)
    drafter.draft_vocab = draft_vocab
    drafter.embedding = None if embedding is None else embedding.detach()
    return drafter.requires_grad_(False).eval()


def save_drafter(drafter: Drafter, directory: str | Path, **config_fields: object) -> None:
    """Write ``drafter`` in our format; ``config_fields`` are added to config.json as they are."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = drafter.config
    tensors = {name: tensor.contiguous() for name, tensor in drafter.state_dict().items()}
    if config.shared_head:
        del tensors[_head_name(config)]
    if drafter.draft_vocab is not None:
        tensors[DRAFT_VOCAB] = drafter.draft_vocab.to(torch.int32)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    fields = {
        "model_type": MODEL_TYPE,
        "architectures": ["ReDrafter"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_draft_layers,
        "rnn": bool(config.rnn),
        "draft_vocab_size": config.draft_vocab_size,
        "shared_head": config.shared_head,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        **config.defaults,
        **({FIELD: config.target.to_json()} if config.target is not None else {}),
        **config_fields,
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def check_files(directory: str | Path, config: DrafterConfig) -> None:
    """Check names and shapes of all tensors before any target is loaded.

    Raises:
        DrafterError: unreadable or truncated files, or tensors that do not fit ``config``.
    """
    directory = Path(directory)
    tensors = _read_tensors(directory, weights=False)
    config = _with_rnn_from_tensors(config, tensors, directory)
    _take_draft_vocab(config, tensors, directory)
    _check_tensors(config, tensors, directory)


def check_target_tables(
    config: DrafterConfig,
    embedding: Tensor | None,
    lm_head: Tensor | None,
    directory: str | Path,
) -> None:
    """Compare the drafter's vocabulary and hidden size with the target's tables.

    Tables may have more rows than the vocabulary (engines pad them), never fewer.
    """
    for name, table in (("input embedding", embedding), ("lm_head", lm_head)):
        if table is None:
            continue
        rows, width = table.shape
        check_target_sizes(config, rows, width, f"the target's {name}", directory)


def check_target_sizes(
    config: DrafterConfig, vocab_size: int, hidden_size: int, what: str, directory: str | Path
) -> None:
    """Raise DrafterError unless a target of this size can use the drafter."""
    if hidden_size != config.hidden_size:
        raise DrafterError(
            f"The drafter in '{directory}' has hidden_size {config.hidden_size}, but {what} has "
            f"{hidden_size}: use a drafter that was trained for this target."
        )
    if vocab_size < config.vocab_size:
        raise DrafterError(
            f"The drafter in '{directory}' has vocab_size {config.vocab_size}, but {what} has "
            f"{vocab_size}: use a drafter that was trained for this target."
        )


def expected_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stored and shared tensors, the draft vocabulary not among them."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Drafter(config).state_dict().items()}


def _head_name(config: DrafterConfig) -> str:
    return f"lm_head.{config.num_draft_layers}.weight"


def _read_tensors(directory: Path, weights: bool = True) -> dict[str, Tensor]:
    """All tensors by name, in memory of their own: a file may be replaced while an engine runs.

    Args:
        weights: False: all but the draft vocabulary on the meta device, of right shape and dtype.
    """
    files = _weight_files(directory)
    if not files:
        pickles = [f.name for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise DrafterError(
                f"'{directory}' holds {pickles[0]} but no safetensors; pickled weights are not "
                f"loaded: run `vllm-redrafter convert {directory} OUT` and use OUT."
            )
        raise DrafterError(f"'{directory}' has no {WEIGHTS_NAME}; put the drafter's weights there.")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if name in tensors:
                        raise DrafterError(
                            f"'{directory}' holds the tensor {shown(name)} in two files; leave "
                            "the right one."
                        )
                    # What safe_open gives is the mapped file itself.
                    tensor = file.get_tensor(name)
                    whole = weights or name == DRAFT_VOCAB
                    tensors[name] = tensor.clone() if whole else tensor.to("meta")
        except (SafetensorError, OSError) as error:
            raise DrafterError(
                f"{path} cannot be read ({one_line(error)}); it is truncated or not safetensors: "
                "copy or download it again."
            ) from error
    return {name: tensor for name, tensor in tensors.items() if name not in IGNORED_TENSORS}


def _weight_files(directory: Path) -> list[Path]:
    """``model.safetensors``, or the shards that an index file names; other files are not ours."""
    if (directory / WEIGHTS_NAME).is_file():
        return [directory / WEIGHTS_NAME]
    index = directory / f"{WEIGHTS_NAME}.index.json"
    if not index.is_file():
        return []
    return shards_of(index, (".safetensors",))


def shards_of(index: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that an index names, all beside it, each once.

    Raises:
        DrafterError: no ``weight_map`` of file names with one of ``suffixes``.
    """
    names = read_json(index).get("weight_map", {})
    if not isinstance(names, dict):
        raise DrafterError(
            f"{index}: weight_map is {shown(names)}; it must say for every tensor in which file "
            "beside the index it is."
        )
    for tensor, name in names.items():
        if not is_file_name(name) or not name.endswith(suffixes):
            raise DrafterError(
                f"{index}: weight_map has {shown(name)} for {shown(tensor)}; it must be the name "
                f"of a file beside the index that ends with {' or '.join(suffixes)}."
            )
    return [index.parent / name for name in sorted(set(names.values()))]


def _with_rnn_from_tensors(
    config: DrafterConfig, tensors: dict[str, Tensor], directory: Path
) -> DrafterConfig:
    """Settle ``rnn``: the tensors present decide, and a config that says otherwise is an error."""
    present = "rnn_w.weight" in tensors
    if config.rnn is None:
        return replace(config, rnn=present)
    if config.rnn != present:
        raise DrafterError(
            f"'{directory}': config.json says rnn is {str(config.rnn).lower()}, but the tensor "
            f"rnn_w.weight is {'present' if present else 'missing'}; make them agree."
        )
    return config


def _take_draft_vocab(
    config: DrafterConfig, tensors: dict[str, Tensor], directory: Path
) -> Tensor | None:
    vocab = tensors.pop(DRAFT_VOCAB, None)
    if vocab is None:
        if config.has_draft_vocab:
            raise DrafterError(
                f"'{directory}': config.json says draft_vocab_size {config.draft_vocab_size} of "
                f"{config.vocab_size}, but there is no tensor '{DRAFT_VOCAB}' of as many ids; "
                "add it to the safetensors file."
            )
        return None
    if vocab.is_floating_point() or vocab.is_complex() or vocab.dtype == torch.bool:
        raise DrafterError(
            f"'{directory}': {DRAFT_VOCAB} is {vocab.dtype}; token ids must be stored as integers."
        )
    vocab = vocab.to(torch.int64)
    if vocab.shape != (config.draft_vocab_size,):
        raise DrafterError(
            f"'{directory}': {DRAFT_VOCAB} has shape {list(vocab.shape)}, but config.json says "
            f"draft_vocab_size {config.draft_vocab_size}: make them agree."
        )
    if vocab.min() < 0 or vocab.max() >= config.vocab_size:
        raise DrafterError(
            f"'{directory}': {DRAFT_VOCAB} holds ids from {int(vocab.min())} to "
            f"{int(vocab.max())}; every id must be from 0 to {config.vocab_size - 1}, as "
            f"vocab_size is {config.vocab_size}."
        )
    # Siblings of one node must hold distinct tokens, or a walk would be ambiguous.
    ids, counts = vocab.unique(return_counts=True)
    if ids.numel() != vocab.numel():
        raise DrafterError(
            f"'{directory}': {DRAFT_VOCAB} holds the id {int(ids[counts > 1][0])} more than once; "
            "all ids must differ."
        )
    return vocab


def _check_tensors(config: DrafterConfig, tensors: dict[str, Tensor], directory: Path) -> None:
    """Raise DrafterError unless ``tensors`` are just those that ``config`` asks to be stored."""
    expected = expected_shapes(config)
    if config.shared_head:
        del expected[_head_name(config)]
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        problem = (
            f"lacks the tensor '{missing[0]}' that its config.json asks for" if missing else
            f"has a tensor {shown(surplus[0])} for which there is no place in its config.json"
        )  # fmt: skip
        raise DrafterError(
            f"'{directory}' {problem}: the config and the weights do not belong together."
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise DrafterError(
                f"'{directory}': {name} has shape {list(tensors[name].shape)}, but config.json "
                f"asks for {list(shape)}: the config and the weights do not belong together."
            )
        if tensors[name].dtype not in WEIGHT_DTYPES:
            raise DrafterError(
                f"'{directory}': {name} is {tensors[name].dtype}; weights must be stored as floats "
                "(float32, bfloat16, float16 or float64)."
            )


__all__ = [
    "APPLE_MODEL_TYPE",
    "DrafterError",
    "check_target_sizes",
    "check_target_tables",
    "expected_shapes",
    "load_drafter",
    "save_drafter",
]
