# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter convert`: pickled or differently named drafter weights into our format."""

import argparse
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_redrafter.cli import UserError
from vllm_redrafter.drafter.checkpoint import (
    DRAFT_VOCAB,
    IGNORED_TENSORS,
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    build_drafter,
    check_target_sizes,
    save_drafter,
    shards_of,
)
from vllm_redrafter.drafter.config import (
    APPLE_MODEL_TYPE,
    APPLE_TOP_K,
    DrafterConfig,
    DrafterError,
    check_size,
    load_config,
)
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.drafter.trim import read_integers, trim_vocabulary
from vllm_redrafter.reading import one_line, shown
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.fingerprint import of_directory
from vllm_redrafter.training.vocabulary import coverage, most_frequent, read_counts

# A state_dict is nested a few times at most; one that contains itself has no end.
_DEEPEST = 16

# Looked for in this order before "whatever single pickle there is".
_USUAL_PICKLES = ("pytorch_model.bin", "model.pt")

# How other tools write Apple's names. TensorRT-LLM's readers number the drafters (always 0) and use
# plurals (examples/redrafter/convert_checkpoint.py of NVIDIA/TensorRT-LLM).
_PREFIX = r"(?P<prefix>(?:[^.]+\.)*?)"
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(_PREFIX + pattern), name)
    for pattern, name in (
        (r"input_projs?\.(?:0\.)?(?P<end>weight|bias)", "input_proj.{end}"),
        (r"rnn_us?\.(?:0\.)?(?P<end>weight|bias)", "rnn_u.{end}"),
        (r"rnn_ws?\.(?:0\.)?(?P<end>weight)", "rnn_w.{end}"),
        (
            r"(?:lm_heads?\.(?:0\.)?|0\.)(?P<layer>[0-9]{1,9})\.(?P<end>linear\.weight|linear\.bias|weight)",
            "lm_head.{layer}.{end}",
        ),
        (r"(?P<end>draft_vocab|emb_norm\.weight)", "{end}"),
    )
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("src", type=Path, metavar="SRC",
                        help="drafter directory, or its weights file (.bin, .pt, .pth or "
                        ".safetensors)")  # fmt: skip
    parser.add_argument("dst", type=Path, metavar="DST", help="directory to write")
    parser.add_argument("--force", action="store_true",
                        help="replace a drafter that is already in DST")  # fmt: skip
    parser.add_argument("--to", choices=("redrafter", "apple"), default="redrafter",
                        help="format to write (default: redrafter)")  # fmt: skip
    parser.add_argument("--target", type=Path, metavar="TARGET_DIR",
                        help="the drafter's target: its fingerprint goes into config.json, so that "
                        "the engine can tell another target from it")  # fmt: skip
    parser.add_argument("--draft-vocab", type=Path, metavar="FILE",
                        help="keep only these rows of a full head: one id a line")  # fmt: skip
    parser.add_argument("--draft-vocab-size", type=int, metavar="N",
                        help="keep only the rows of the N most frequent tokens of a full head, by "
                        "--frequencies")  # fmt: skip
    parser.add_argument("--frequencies", type=Path, metavar="FILE_OR_DATASET",
                        help="how often each token occurs: one count a line, token 0's first; or "
                        "a directory that `vllm-redrafter data` made, whose answers are "
                        "counted")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Convert, print what was written; returns the exit code."""
    remarks: list[str] = []
    try:
        rows = _which_rows(args, remarks)
        drafter = convert(
            args.src, args.dst, force=args.force, to=args.to, draft_vocab=rows, target=args.target
        )
    except (DrafterError, TrainingError) as error:
        raise UserError(str(error)) from error
    config = drafter.config
    print(
        f"wrote {args.dst}: hidden_size {config.hidden_size}, vocab_size {config.vocab_size}, "
        f"exit_dim {config.exit_dim}, {config.num_draft_layers} residual blocks, "
        f"rnn {'on' if config.rnn else 'off'}, {str(drafter.dtype).removeprefix('torch.')}"
    )
    for remark in remarks:
        print(remark)
    if args.to == "apple" and (lost := not_in_apples_format(config)):
        options = ", ".join(f"{name} {value}" for name, value in lost.items())
        print(
            f"note: Apple's format has no place for {options}; give them where the drafter is "
            "served, or its top_k is 50."
        )
    return 0


def _which_rows(args: argparse.Namespace, remarks: list[str]) -> Callable[[int], list[int]] | None:
    """What the options say about the draft vocabulary: from the vocabulary's size to ids.

    Args:
        remarks: gets sentences about the ids, when they are chosen.

    Raises:
        DrafterError: options that do not go together.
    """
    size, source = args.draft_vocab_size, args.frequencies
    if (size is None) != (source is None):
        raise DrafterError("--draft-vocab-size and --frequencies need each other; give both.")
    if args.draft_vocab is not None:
        if size is not None:
            raise DrafterError(
                "--draft-vocab and --draft-vocab-size were both given; give one of them."
            )
        return lambda vocab_size: read_integers(args.draft_vocab)
    if size is None:
        return None

    def choose(vocab_size: int) -> list[int]:
        if not 1 <= size < vocab_size:
            raise DrafterError(
                f"--draft-vocab-size is {size}; it must be at least 1 and below the drafter's "
                f"vocabulary of {vocab_size}."
            )
        counts = read_counts(source, vocab_size)
        ids = most_frequent(counts, size)
        share, unseen = coverage(counts, ids), int((counts[ids] == 0).sum())
        remarks.append(f"draft vocabulary: {share:.1%} of the counted tokens can be drafted")
        if unseen:
            remarks.append(f"note: {unseen} of its {size} tokens were never counted.")
        return ids.tolist()

    return choose


def not_in_apples_format(config: DrafterConfig) -> dict[str, Any]:
    """The serving defaults that a reader of Apple's format would not find out by itself."""
    defaults = {"top_k": 0, **config.defaults}
    return {name: value for name, value in defaults.items() if (name, value) != ("top_k", 50)}


def convert(
    src: Path,
    dst: Path,
    *,
    force: bool = False,
    to: str = "redrafter",
    draft_vocab: Callable[[int], list[int]] | None = None,
    target: Path | None = None,
) -> Drafter:
    """Write the drafter in ``src`` to the directory ``dst`` as config.json and safetensors.

    Pickles are read with ``weights_only``: a file that holds anything but tensors and plain
    values is refused, and nothing in it runs. ``to`` is ``redrafter`` or ``apple``.
    ``draft_vocab`` gets the size of the vocabulary and says which ids of it to keep. ``target`` is
    the directory of the drafter's target, whose fingerprint is then written.

    Raises:
        TrainingError: a ``target`` of which no fingerprint can be taken.
        DrafterError: nothing to convert, unreadable or refused weights, names that are no
            drafter's, a ``dst`` in use, or a drafter that ``to`` or ``draft_vocab`` does not
            suit.
    """
    if not src.exists():
        raise DrafterError(f"'{src}' does not exist; give a drafter's directory or weights file.")
    if dst.exists() and not dst.is_dir():
        raise DrafterError(f"'{dst}' is a file; give the name of a directory to write.")
    if dst.is_dir() and any(dst.iterdir()) and not force:
        raise DrafterError(
            f"'{dst}' is not empty; give another directory, or --force to replace what is there."
        )
    directory = src if src.is_dir() else src.parent
    tensors = own_memory(usual_names(read_weights(src), src), src)
    if (directory / "config.json").is_file():
        config = load_config(directory)
    else:
        config = config_from_shapes(tensors, src)
    # Nothing of a shared head is stored; its place only has to have the right shape.
    lm_head = None
    if config.shared_head:
        lm_head = torch.empty(config.vocab_size, config.hidden_size, device="meta")
    drafter = build_drafter(config, tensors, directory, lm_head=lm_head)
    if draft_vocab is not None:
        drafter = trim_vocabulary(drafter, draft_vocab(config.vocab_size))
    if target is not None:
        _take_fingerprint(drafter, src, target, to)
    dst.parent.mkdir(parents=True, exist_ok=True)
    # Two files that belong together: written aside, so that a failure leaves no half of them.
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as aside:
        (save_apple if to == "apple" else save_drafter)(drafter, aside)
        dst.mkdir(exist_ok=True)
        for name in (WEIGHTS_NAME, "config.json"):
            os.replace(Path(aside) / name, dst / name)
    return drafter


def _take_fingerprint(drafter: Drafter, source: Path, target: Path, to: str) -> None:
    if to == "apple":
        raise DrafterError("Apple's format has no place for a fingerprint; leave out --target.")
    found, config = of_directory(target), drafter.config
    check_target_sizes(
        config, found.vocab_size, found.hidden_size, f"the target '{target}'", source
    )
    drafter.config = replace(config, target=found)


def save_apple(drafter: Drafter, directory: str | Path) -> None:
    """Write ``drafter`` in Apple's format, which has no serving options: readers use top_k 50.

    Raises:
        DrafterError: a draft vocabulary or a shared head, for which that format has no place.
    """
    config = drafter.config
    if drafter.draft_vocab is not None or config.shared_head:
        what = "shares its output head with the target" if config.shared_head else (
            f"has a draft vocabulary of {config.draft_vocab_size} ids"
        )  # fmt: skip
        raise DrafterError(
            f"The drafter {what}, which Apple's format cannot store; leave out --to apple."
        )
    tensors = {name: tensor.contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(tensors, Path(directory) / WEIGHTS_NAME, metadata={"format": "pt"})
    fields = {
        "model_type": APPLE_MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_draft_layers,
        "rnn": bool(config.rnn),
    }
    text = json.dumps(fields, indent=2) + "\n"
    (Path(directory) / "config.json").write_text(text, encoding="utf-8")


def read_weights(src: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, or of the weight files of a directory, by dotted names.

    They may share memory with each other and with the files.
    """
    files = [src] if src.is_file() else _weight_files(src)
    tensors: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            try:
                tensors |= load_file(path)
            except (SafetensorError, OSError) as error:
                raise DrafterError(
                    f"{path} cannot be read ({one_line(error)}); it is truncated or not "
                    "safetensors: copy or download it again."
                ) from error
        else:
            tensors |= dict(_flatten(_load_pickle(path)))
    if not tensors:
        raise DrafterError(f"{files[0]} holds no tensors, so there is no drafter to convert.")
    return tensors


def own_memory(tensors: Mapping[str, Tensor], src: Path) -> dict[str, Tensor]:
    """The same tensors, apart from each other and from any file.

    A pickle may hold views of one storage, which safetensors does not write; and a small one may
    hold tensors of any size, of which every element is the same few bytes.

    Raises:
        DrafterError: tensors of a kind that no weights are, or larger than what is stored of them.
    """
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            what = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise DrafterError(
                f"'{src}': {shown(name)} is {what}; save the drafter's weights as plain tensors."
            )
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
    stored = sum(storage.nbytes() for storage in storages.values())
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > stored:
        raise DrafterError(
            f"'{src}' holds tensors of {claimed} bytes, of which only {stored} are stored: some "
            "are expanded, or there twice; save them with .contiguous() and under one name each."
        )
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _weight_files(directory: Path) -> list[Path]:
    for name in (WEIGHTS_NAME, *_USUAL_PICKLES):
        if (directory / name).is_file():
            return [directory / name]
    for name in (WEIGHTS_NAME, _USUAL_PICKLES[0]):
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = shards_of(index, (*PICKLE_SUFFIXES, ".safetensors"))
            if shards:
                return shards
    found = sorted(f for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if len(found) == 1:
        return found
    if not found:
        raise DrafterError(
            f"'{directory}' holds no weights ({', '.join((*PICKLE_SUFFIXES, '.safetensors'))}); "
            "give the drafter's directory or its weights file."
        )
    names = ", ".join(path.name for path in found)
    raise DrafterError(f"'{directory}' holds several weight files ({names}); give one of them.")


def _load_pickle(path: Path) -> Any:
    try:
        _check_stored(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DrafterError(f"{path} does not exist; copy or download it again.") from error
    except pickle.UnpicklingError as error:
        raise DrafterError(
            f"{path} is refused: it is damaged, or holds Python objects besides tensors, and such "
            "a pickle can run any code; save the drafter's state_dict alone "
            "(torch.save(drafter.state_dict(), ...)) and convert that."
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).strip().splitlines()
        raise DrafterError(
            f"{path} cannot be read ({reason[0] if reason else type(error).__name__}); it is "
            "truncated or not written by torch.save: copy or download it again."
        ) from error


def _check_stored(path: Path) -> None:
    """Raise ValueError for an archive of more than its own size: torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return  # the older format has no compression
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it is compressed, and {unpacked} bytes long without that")


def _flatten(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings by dotted name; counters and other plain values are left out."""
    if isinstance(value, Tensor):
        yield prefix.removesuffix("."), value
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        for key, item in value.items():
            if isinstance(key, (str, int)):
                yield from _flatten(item, f"{prefix}{key}.", depth + 1)


def usual_names(tensors: Mapping[str, Tensor], src: Path) -> dict[str, Tensor]:
    """The drafter's tensors by Apple's names, whatever prefix and spelling they came with.

    Tensors outside the drafter's prefix (a target saved along) are left out.

    Raises:
        DrafterError: no drafter's names, two drafters, or further tensors beside the drafter's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        for pattern, spelling in _SPELLINGS:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                ours = spelling.format(**groups)
                if ours not in IGNORED_TENSORS:
                    of_prefix = found.setdefault(groups["prefix"], {})
                    if ours in of_prefix:
                        raise DrafterError(f"'{src}' holds the tensor {ours} twice (as {name}).")
                    of_prefix[ours] = tensor
                break
        else:
            unknown.append(name)
    if not found:
        raise DrafterError(
            f"'{src}' holds no drafter: among its {len(tensors)} tensors (such as "
            f"{next(iter(tensors))}) none has a drafter's name, such as lm_head.0.linear.weight."
        )
    if len(found) > 1:
        prefixes = ", ".join(repr(prefix) for prefix in sorted(found))
        raise DrafterError(
            f"'{src}' holds drafter tensors under several prefixes ({prefixes}); save one "
            "drafter's state_dict alone and convert that."
        )
    ((prefix, drafter),) = found.items()
    strays = [name for name in unknown if name.startswith(prefix)]
    if strays:
        raise DrafterError(
            f"'{src}' holds {strays[0]}, which is no tensor of a recurrent drafter; save the "
            "drafter's state_dict alone and convert that."
        )
    return drafter


def config_from_shapes(tensors: Mapping[str, Tensor], src: Path) -> DrafterConfig:
    """The config of Apple's format that fits the tensors, for a checkpoint without config.json."""
    heads = [
        int(name.split(".")[1]) for name in tensors if re.fullmatch(r"lm_head\.\d+\.weight", name)
    ]
    if len(heads) != 1 or DRAFT_VOCAB in tensors:
        why = (
            f"it has a {DRAFT_VOCAB}"
            if DRAFT_VOCAB in tensors
            else f"it has {len(heads)} output layers (lm_head.N.weight)"
        )
        raise DrafterError(
            f"'{src}' has no config.json beside it, and its shapes do not say enough ({why}); put "
            "the drafter's config.json there."
        )
    vocab_size, exit_dim = _matrix(tensors, f"lm_head.{heads[0]}.weight", src)
    if "input_proj.weight" in tensors:
        both = _matrix(tensors, "input_proj.weight", src)[1]
    else:
        both = exit_dim
    config = DrafterConfig(
        vocab_size=vocab_size,
        hidden_size=both // 2,
        exit_dim=exit_dim,
        num_draft_layers=heads[0],
        rnn=None,
        draft_vocab_size=vocab_size,
        defaults={"top_k": APPLE_TOP_K},
        apple=True,
    )
    check_size("num_draft_layers", config.num_draft_layers, src, minimum=0)
    for name in ("vocab_size", "hidden_size", "exit_dim"):
        check_size(name, getattr(config, name), src)
    return config


def _matrix(tensors: Mapping[str, Tensor], name: str, src: Path) -> tuple[int, int]:
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise DrafterError(f"'{src}': {name} has shape {list(shape)}; it must be a matrix.")
    return shape[0], shape[1]
