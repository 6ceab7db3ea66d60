# SPDX-License-Identifier: Apache-2.0
"""Recorded greedy answers of a target: from JSON lines, or from a dataset that `data` made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_redrafter.reading import one_line, shown
from vllm_redrafter.training.dataset import Dataset, check_fits
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.jsonl import is_text, numbered_lines, parse_line
from vllm_redrafter.training.manifest import read_manifest
from vllm_redrafter.training.repeats import is_looping
from vllm_redrafter.training.shards import read_shard, shard_texts


@dataclass(frozen=True)
class Recorded:
    """One greedy answer of the target.

    Attributes:
        prompt: token ids, at least one.
        answer: token ids, at least one.
        category: as the file says, or None.
        finish_reason: vLLM's word for why it ended, ``stop`` or ``length``; None: not known.
        max_tokens: the most that the request could say; None: not known.
    """

    prompt: list[int]
    answer: list[int]
    category: str | None = None
    finish_reason: str | None = None
    max_tokens: int | None = None

    @property
    def looping(self) -> bool:
        return is_looping(self.answer)

    @property
    def limit(self) -> int | None:
        """The most that the request could say, as far as it shows."""
        # The model's length may have ended it before max_tokens did.
        return len(self.answer) if self.finish_reason == "length" else self.max_tokens

    @property
    def drafting_positions(self) -> int:
        """From how many of its tokens, the first ones, a draft would be made and verified."""
        # The last token ends the request; with one token to go under max_tokens a draft is useless.
        last = len(self.answer) - 1
        return max(0, last if self.limit is None else min(last, self.limit - 2))


def read_answers(
    path: str | Path, vocab_size: int, tokenizer_sha256: str | None = None
) -> list[Recorded]:
    """The answers of a JSON lines file, or those at temperature 0 of a dataset directory.

    Args:
        path: empty lines of a file are passed over. Of a dataset the filters of `data` have dropped
            some answers, looping ones by default; what follows an answer is not recorded there.
        vocab_size: every id must be below it.
        tokenizer_sha256: of the target; a dataset must have been made with it. None: not compared.

    Raises:
        TrainingError: an unreadable file, a broken line (with its number), another target's
            dataset, no answers, or none that has a token to draft.
    """
    if Path(path).is_dir():
        answers = _read_dataset(Path(path), vocab_size, tokenizer_sha256)
    else:
        answers = _read_lines(path, vocab_size)
    if all(len(recorded.answer) < 2 for recorded in answers):
        raise TrainingError(
            f"--answers {path}: no answer has two tokens, so nothing is ever drafted; give longer "
            "answers."
        )
    return answers


def _read_lines(path: str | Path, vocab_size: int) -> list[Recorded]:
    answers = []
    for number, line in numbered_lines(path, "--answers"):
        try:
            answers.append(_recorded(parse_line(line), vocab_size))
        except ValueError as error:
            what = one_line(error).removesuffix(".")
            raise TrainingError(f"--answers {path}, line {number}: {what}.") from error
    if not answers:
        raise TrainingError(f"--answers {path} holds no answers; give one JSON object a line.")
    return answers


def _recorded(value: Any, vocab_size: int) -> Recorded:
    if not isinstance(value, dict):
        raise ValueError(f"this is {type(value).__name__}, not a JSON object.")
    for name in ("prompt_token_ids", "token_ids"):
        ids = value.get(name)
        if not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise ValueError(f"{name} must be a list of whole numbers.")
        if not ids:
            raise ValueError(f"{name} is empty; leave such answers out.")
        for one in ids:
            if not 0 <= one < vocab_size:
                raise ValueError(
                    f"{name} has the id {shown(one)}, but the target's vocabulary has {vocab_size} "
                    "tokens; give answers of this target."
                )
    category = value.get("category")
    if category is not None and not is_text(category):
        raise ValueError(f"category is {shown(category)}; it must be a string.")
    reason = value.get("finish_reason")
    if reason not in (None, "stop", "length"):
        raise ValueError(f"finish_reason is {shown(reason)}; it must be 'stop' or 'length'.")
    limit = value.get("max_tokens")
    if limit is not None and (type(limit) is not int or limit < len(value["token_ids"])):
        raise ValueError(
            f"max_tokens is {shown(limit)}; it must be a whole number, no less than token_ids has."
        )
    return Recorded(
        value["prompt_token_ids"],
        value["token_ids"],
        category,
        reason,
        limit,
    )


def _read_dataset(directory: Path, vocab_size: int, tokenizer_sha256: str | None) -> list[Recorded]:
    manifest = read_manifest(directory)
    answers, texts = [], []
    for entry in sorted(manifest["shards"], key=lambda entry: entry["number"]):
        shard = read_shard(directory, entry)
        kinds = zip(shard["temperatures"].tolist(), shard["ended"].tolist(), strict=True)
        for (text, prompt), (temperature, ended) in zip(shard_texts(shard), kinds, strict=True):
            if temperature == 0:
                ids, reason = text.tolist(), "stop" if ended else "length"
                answers.append(Recorded(ids[:prompt], ids[prompt:], finish_reason=reason))
                texts.append(text)
    if not answers:
        raise TrainingError(
            f"--answers {directory} holds no answers at temperature 0, and only greedy ones can be "
            "replayed; make some with `vllm-redrafter data --temperatures 0`."
        )
    everywhere = [torch.ones(len(text), dtype=torch.bool) for text in texts]
    check_fits(Dataset(texts, everywhere, manifest), vocab_size, tokenizer_sha256, str(directory))
    return answers
