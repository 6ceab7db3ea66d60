# SPDX-License-Identifier: Apache-2.0
"""The frozen target: tables, hidden states, and the distribution that is distilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.drafter.fingerprint import vocab_sha256
from vllm_redrafter.reading import one_line
from vllm_redrafter.training.dataset import Dataset
from vllm_redrafter.training.errors import TrainingError, missing

# Tokens of one pass, padding included: enough for a device to be busy, little for its memory.
_PASS_TOKENS = 8192


def quiet_transformers() -> None:
    """Its bar for loading weights would run through ours."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # said in better words by whoever needs it
    logging.disable_progress_bar()


def choose_device(name: str, local: int | None = None) -> torch.device:
    """The device that ``--device`` means.

    Args:
        name: a torch device, or ``auto``: a GPU where there is one.
        local: this process's number on its machine, under torchrun.

    Raises:
        TrainingError: there is no such device.
    """
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise TrainingError(
                f"--device {name} is not there ({str(error).splitlines()[0]}); give cpu or auto."
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", local or 0)
    return torch.device("cpu")


class Target:
    """A causal language model of transformers that only ever computes hidden states.

    Attributes:
        name: its directory's name.
        embedding: ``[rows, H]``, the input embedding table.
        head: ``[V, H]``, the output head.
        num_hidden_layers: None where its config does not say.
    """

    def __init__(self, directory: str | Path, dtype: str, device: torch.device) -> None:
        """Load from a local directory.

        Raises:
            TrainingError: no such directory, no transformers, or not a causal language model.
        """
        path = Path(directory)
        if not (path / "config.json").is_file():
            raise TrainingError(
                f"the target '{directory}' is not a directory with config.json; give a local model "
                "directory."
            )
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise missing("transformers", "training") from error
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
            )
        except Exception as error:  # broken files make it raise many kinds
            raise TrainingError(
                f"the target '{directory}' cannot be loaded as a causal language model "
                f"({one_line(error)})."
            ) from error
        self.name = path.resolve().name
        self._model = model.requires_grad_(False).eval().to(device)
        self.device = device
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self.head: Tensor = model.get_output_embeddings().weight.detach()
        config = model.config.get_text_config()
        self.num_hidden_layers: int | None = getattr(config, "num_hidden_layers", None)
        # Gemma caps its logits, Granite divides them, Cohere multiplies: part of the distribution.
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._factor = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.head.shape[1]

    @torch.inference_mode()
    def hidden(self, sequences: list[Tensor]) -> list[Tensor]:
        """Hidden states after the final norm: per sequence of ids ``[n]``, ``[n, H]``.

        Several passes where there is much: sequences of like length together.
        """
        found: dict[int, Tensor] = {}
        for members in padded_groups([len(tokens) for tokens in sequences], _PASS_TOKENS):
            # Padding on the right: no earlier position can see it, so it needs no mask.
            ids = torch.zeros(len(members), len(sequences[members[-1]]), dtype=torch.int64)
            for row, i in zip(ids, members, strict=True):
                row[: len(sequences[i])] = sequences[i]
            states = self._model.base_model(
                input_ids=ids.to(self.device), use_cache=False
            ).last_hidden_state
            # Views would keep the padding in memory.
            found |= {i: states[at, : len(sequences[i])].clone() for at, i in enumerate(members)}
        return [found[i] for i in range(len(sequences))]

    @torch.inference_mode()
    def probabilities(self, hidden: Tensor, head: Tensor) -> Tensor:
        """The target's distribution over some of its tokens: ``[R, V']`` float32.

        Renormalised over these: what cannot be drafted has no part in it.

        Args:
            hidden: ``[R, H]``.
            head: ``[V', H]``, those tokens' rows of the target's head.
        """
        logits = (hidden.to(head.dtype) @ head.T).float() * self._factor
        if self._cap:
            logits = self._cap * torch.tanh(logits / self._cap)
        return torch.softmax(logits, -1)

    def final_norm(self) -> Any | None:
        """The module that makes hidden states ready for the head; None where it is not known."""
        for name in ("norm", "final_layernorm", "ln_f", "final_layer_norm"):
            norm = getattr(self._model.base_model, name, None)
            if norm is not None:
                return norm
        return None


def padded_groups(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Sequences, shortest first, in groups of at most ``limit`` tokens, padding included.

    One that is longer than ``limit`` is a group of its own. A group's last is its longest.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > limit:
            groups.append([])
        groups[-1].append(i)
    return groups


def tokenizer_sha256(directory: str | Path) -> str | None:
    """A fingerprint of the target's vocabulary; None when it has no tokenizer."""
    try:
        from transformers import AutoTokenizer

        vocab = AutoTokenizer.from_pretrained(str(directory)).get_vocab()
    except Exception:  # there is none, or broken files, which make it raise many kinds
        return None
    return vocab_sha256(vocab)


def with_finished_states(target: Target, dataset: Dataset) -> Dataset:
    """The same data, its stored hidden states (if any) as the target's head wants them.

    Raises:
        TrainingError: see `check_stored_states`.
    """
    stored = dataset.hidden
    if stored is None:
        return dataset
    # A text that was cut may have lost its whole answer, and with it its states.
    some = (i for i in range(len(dataset)) if (here := stored(i)) is not None and here.any())
    at = next(some, None)
    if at is None or not check_stored_states(target, dataset.tokens[at].long(), stored(at)):
        return dataset
    norm = target.final_norm()

    @torch.inference_mode()
    def normed(number: int) -> Tensor | None:
        states = stored(number)
        return None if states is None else norm(states.to(target.device, target.head.dtype))

    return replace(dataset, hidden=normed)


@torch.inference_mode()
def check_stored_states(target: Target, tokens: Tensor, stored: Tensor) -> bool:
    """Whether stored hidden states still need the final norm; by computing one sequence anew.

    Args:
        tokens: ``[n]``.
        stored: ``[n, H]``; rows of zeros are not there.

    Returns:
        False when they are as the target's head wants them, True when they lack the norm.

    Raises:
        TrainingError: they are neither, so they are another model's.
    """
    if stored.shape[-1] != target.hidden_size:
        raise TrainingError(
            f"the stored hidden states have size {stored.shape[-1]}, but the target's have "
            f"{target.hidden_size}; give the target that they were taken from."
        )
    there = stored.any(-1)
    wanted = target.hidden([tokens])[0].float()[there.to(target.device)]
    stored = stored[there].to(wanted.device)
    candidates = {False: stored.float()}
    norm = target.final_norm()
    if norm is not None:
        candidates[True] = norm(stored.to(target.head.dtype)).float()
    errors = {
        key: float((value - wanted).norm() / wanted.norm()) for key, value in candidates.items()
    }
    best = min(errors, key=errors.__getitem__)
    # Another kernel in bfloat16 differs by a few per cent; another model by about 1, or by NaN.
    if not errors[best] <= 0.3:
        raise TrainingError(
            "the stored hidden states are not this target's (relative difference "
            f"{errors[best]:.2f}); give the target that they were taken from."
        )
    return best
