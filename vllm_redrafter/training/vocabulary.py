# SPDX-License-Identifier: Apache-2.0
"""Which tokens a drafter can say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.training.dataset import Dataset


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


def default_size(hidden_size: int, vocab_size: int) -> int:
    """The head must cost little beside the target's own layers; those grow with hidden_size."""
    wanted = 8192 if hidden_size < 1024 else 16384 if hidden_size < 3072 else 32768
    return min(wanted, vocab_size)


def choose(dataset: Dataset, members: Iterable[int], size: int, vocab_size: int) -> DraftVocabulary:
    """The ``size`` tokens most frequent in the answers of ``members``; ties to the lower id."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for i in members:
        said = dataset.tokens[i][dataset.answer[i]].long()
        counts += torch.bincount(said, minlength=vocab_size)
    total = max(int(counts.sum()), 1)
    if size >= vocab_size:
        return DraftVocabulary(None, torch.arange(vocab_size), 1.0)
    ids = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
    rows = torch.full((vocab_size,), -1)
    rows[ids] = torch.arange(size)
    return DraftVocabulary(ids, rows, int(counts[ids].sum()) / total)
