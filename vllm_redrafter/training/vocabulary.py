# SPDX-License-Identifier: Apache-2.0
"""Which tokens a drafter can say: the most frequent ones in the target's answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_redrafter.drafter.trim import read_integers
from vllm_redrafter.training.dataset import Dataset, check_fits, load_dataset
from vllm_redrafter.training.errors import TrainingError


@dataclass(frozen=True)
class DraftVocabulary:
    """The chosen ids and what they cover.

    Attributes:
        ids: ``[V']`` int64, rising; None for the whole vocabulary.
        rows: ``[V]`` int64, the head's row of every token, -1 where it has none.
        coverage: share of the answers' tokens that can be drafted.
    """

    ids: Tensor | None
    rows: Tensor
    coverage: float

    @property
    def size(self) -> int:
        return self.rows.numel() if self.ids is None else self.ids.numel()


def choose(
    dataset: Dataset,
    members: Iterable[int],
    size: int,
    vocab_size: int,
    fixed: Tensor | None = None,
) -> DraftVocabulary:
    """The ``size`` tokens most frequent in the answers of ``members``; ties to the lower id.

    Args:
        fixed: ``[size]`` int64, ids that are settled already; only their coverage is counted.
    """
    if size >= vocab_size:
        return DraftVocabulary(None, torch.arange(vocab_size), 1.0)
    counts = count_tokens(dataset, members, vocab_size)
    ids = most_frequent(counts, size) if fixed is None else fixed
    rows = torch.full((vocab_size,), -1)
    rows[ids] = torch.arange(size)
    return DraftVocabulary(ids, rows, coverage(counts, ids))


def count_tokens(dataset: Dataset, members: Iterable[int], vocab_size: int) -> Tensor:
    """How often every token occurs in the answers of ``members``: ``[vocab_size]`` int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for i in members:
        said = dataset.tokens[i][dataset.answer[i]].long()
        counts += torch.bincount(said, minlength=vocab_size)
    return counts


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """The ids of the ``size`` largest ``counts``, rising; ties to the lower id."""
    return torch.sort(counts, descending=True, stable=True).indices[:size].sort().values


def coverage(counts: Tensor, ids: Tensor) -> float:
    """Share of all counted tokens that are among ``ids``; 0.0 when nothing was counted."""
    return int(counts[ids].sum()) / max(int(counts.sum()), 1)


def read_counts(source: Path, vocab_size: int) -> Tensor:
    """Token counts, ``[vocab_size]`` int64, for a drafter of that vocabulary.

    Args:
        source: a file with one count a line, that of token 0 first; or a dataset directory, of
            whose answers the tokens are counted.

    Raises:
        TrainingError: not a dataset, or one of another vocabulary.
        DrafterError: an unreadable file, or a line that is no integer.
    """
    if source.is_dir():
        dataset = load_dataset(source)
        check_fits(dataset, vocab_size, None, str(source))
        return count_tokens(dataset, range(len(dataset)), vocab_size)
    counts = read_integers(source)
    if len(counts) != vocab_size:
        raise TrainingError(
            f"{source} has {len(counts)} lines, but the drafter's vocabulary has {vocab_size} "
            "tokens; give one count a line, that of token 0 first."
        )
    for number, count in enumerate(counts, start=1):
        if count < 0:
            raise TrainingError(f"{source}, line {number}: {count} is not a count.")
    if sum(counts) >= 2**63:
        raise TrainingError(f"{source} counts more than 2^63 tokens; give counts of real text.")
    if not any(counts):
        raise TrainingError(f"{source} counts no token at all; give counts of real text.")
    return torch.tensor(counts, dtype=torch.int64)
