# SPDX-License-Identifier: Apache-2.0
"""What a drafter directory's ``config.json`` says.

Two formats are read: Apple's (``model_type: recurrent_drafting_drafter``, written by
``recurrent_drafting/configuration_drafter.py``) and ours (``model_type: redrafter``), which adds a
draft vocabulary, an output head shared with the target, and defaults for the serving options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_redrafter.drafter import fingerprint
from vllm_redrafter.drafter.fingerprint import Fingerprint
from vllm_redrafter.reading import is_integer, one_line, parse_json, shown

APPLE_MODEL_TYPE = "recurrent_drafting_drafter"
MODEL_TYPE = "redrafter"
MODEL_TYPES = (MODEL_TYPE, APPLE_MODEL_TYPE)

# Apple keeps the 50 largest logits of every row before the log-softmax (``warp_logits``).
APPLE_TOP_K = 50

# Serving options that a config.json of ours may give defaults for.
SERVING_DEFAULTS = (
    "beam_width",
    "draft_length",
    "tree",
    "top_k",
    "num_speculative_tokens",
    "num_speculative_tokens_per_batch_size",
)


# Far above any model, and low enough for counts of bytes to fit 63 bits.
LARGEST = {
    "vocab_size": 2**31 - 1,  # token ids are int32
    "draft_vocab_size": 2**31 - 1,
    "hidden_size": 2**20,
    "exit_dim": 2**21,
    "num_draft_layers": 1024,
}


class DrafterError(ValueError):
    """A drafter directory that cannot be used; the message names the value and the cure."""


@dataclass(frozen=True)
class DrafterConfig:
    """Shapes of a recurrent drafter.

    Attributes:
        vocab_size: rows of the target's output head (not the tokenizer's size).
        hidden_size: width H of the target's hidden state and of its input embedding.
        exit_dim: width X inside the drafter's head; ``input_proj`` exists only if X != 2H.
        num_draft_layers: number of residual blocks, 0 or more.
        rnn: recurrent cell ``SiLU(W e + U s + b)``; if False the state is a running sum of
            embeddings. None when the config does not say: the tensors present decide.
        draft_vocab_size: rows of the drafter's output head; equals ``vocab_size`` unless the
            drafter has a draft vocabulary.
        shared_head: the output head is rows of the target's own output head; nothing is stored.
        defaults: serving options found in the config (see ``SERVING_DEFAULTS``).
        apple: read from Apple's format.
        target: the target's fingerprint; None where the drafter was written without one.
    """

    vocab_size: int
    hidden_size: int
    exit_dim: int
    num_draft_layers: int
    rnn: bool | None
    draft_vocab_size: int
    shared_head: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    apple: bool = False
    target: Fingerprint | None = None

    @property
    def has_draft_vocab(self) -> bool:
        return self.draft_vocab_size != self.vocab_size

    @property
    def has_input_proj(self) -> bool:
        return self.exit_dim != 2 * self.hidden_size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises DrafterError if it is not one."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DrafterError(
            f"{path} is not readable JSON ({one_line(error)}); write it again."
        ) from error
    if not isinstance(value, dict):
        raise DrafterError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


def model_type_of(directory: str | Path) -> str | None:
    """``model_type`` of a local directory's config.json, or None if there is none to read."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        return None
    try:
        return read_json(path).get("model_type")
    except DrafterError:
        return None


def load_config(directory: str | Path) -> DrafterConfig:
    """Read and check ``directory/config.json``.

    Raises:
        DrafterError: no such directory or file, an unknown ``model_type``, or a missing or
            impossible field.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DrafterError(
            f"The drafter directory '{directory}' does not exist; give the path of a local "
            "directory that holds config.json and model.safetensors."
        )
    path = directory / "config.json"
    if not path.is_file():
        raise DrafterError(
            f"'{directory}' has no config.json; give the directory of a drafter, which holds "
            "config.json and model.safetensors."
        )
    return parse_config(read_json(path), where=str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> DrafterConfig:
    """Check a config that was read already; ``where`` goes into the messages."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise DrafterError(
            f"{where} has model_type {shown(model_type)}; a ReDrafter checkpoint has "
            f"{' or '.join(repr(name) for name in MODEL_TYPES)}: give a drafter's directory, not a "
            "target's."
        )
    sizes = {
        name: _integer(raw, name, where, minimum=0 if name == "num_draft_layers" else 1)
        for name in ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers")
    }
    rnn = raw.get("rnn")
    if rnn is not None and not isinstance(rnn, bool):
        raise DrafterError(f"{where}: rnn is {shown(rnn)}; it must be true or false.")
    draft_vocab_size = sizes["vocab_size"]
    if raw.get("draft_vocab_size") is not None:
        draft_vocab_size = _integer(raw, "draft_vocab_size", where, minimum=1)
        if draft_vocab_size > sizes["vocab_size"]:
            raise DrafterError(
                f"{where}: draft_vocab_size {draft_vocab_size} is larger than vocab_size "
                f"{sizes['vocab_size']}."
            )
    shared_head = raw.get("shared_head", False)
    if not isinstance(shared_head, bool):
        raise DrafterError(
            f"{where}: shared_head is {shown(shared_head)}; it must be true or false."
        )
    if shared_head and sizes["exit_dim"] != sizes["hidden_size"]:
        raise DrafterError(
            f"{where}: shared_head needs exit_dim equal to hidden_size, but exit_dim is "
            f"{sizes['exit_dim']} and hidden_size is {sizes['hidden_size']}."
        )
    apple = model_type == APPLE_MODEL_TYPE
    defaults = {name: raw[name] for name in SERVING_DEFAULTS if raw.get(name) is not None}
    if apple:
        defaults.setdefault("top_k", APPLE_TOP_K)
    return DrafterConfig(
        **sizes,
        rnn=rnn,
        draft_vocab_size=draft_vocab_size,
        shared_head=shared_head,
        defaults=defaults,
        apple=apple,
        target=_fingerprint(raw, sizes, where),
    )


def _fingerprint(raw: dict[str, Any], sizes: dict[str, int], where: str) -> Fingerprint | None:
    try:
        target = fingerprint.parse(raw.get(fingerprint.FIELD))
        for name in ("vocab_size", "hidden_size"):
            if target is not None and getattr(target, name) != sizes[name]:
                raise ValueError(f"has another {name} than the drafter")
    except ValueError as error:
        raise DrafterError(
            f"{where}: {fingerprint.FIELD} {error}; remove it, or write it again with "
            "`vllm-redrafter convert --target`."
        ) from error
    return target


def _integer(raw: dict[str, Any], name: str, where: str, minimum: int) -> int:
    value = raw.get(name)
    if value is None:
        raise DrafterError(f"{where} lacks the field {name!r}; add it (an integer >= {minimum}).")
    check_size(name, value, where, minimum)
    return value


def check_size(name: str, value: Any, where: str | Path, minimum: int = 1) -> None:
    """Raise DrafterError unless ``value`` is an integer from ``minimum`` to ``LARGEST[name]``."""
    if type(value) is int and value > LARGEST[name]:
        raise DrafterError(
            f"{where}: {name} is {shown(value)}; no drafter is so large, the most is "
            f"{LARGEST[name]}: write what its tensors have."
        )
    if not is_integer(value, minimum, LARGEST[name]):
        raise DrafterError(
            f"{where}: {name} is {shown(value)}; it must be an integer >= {minimum}."
        )
