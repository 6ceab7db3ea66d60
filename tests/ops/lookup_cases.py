# SPDX-License-Identifier: Apache-2.0
"""Batches of texts for the suffix lookup."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_redrafter.lookup.suffix import Chains

POISON = -77


class Batch(NamedTuple):
    text: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def random_batch(batch: int, rows: int, columns: int, vocab: int, *, seed: int) -> Batch:
    """Rows in any order and more than once; starts near the front; some texts empty or whole."""
    torch.manual_seed(seed)
    ends = torch.randint(columns + 1, (batch,))
    ends[torch.rand(batch) < 0.3] = columns
    starts = (ends * torch.rand(batch) ** 3).long()
    return Batch(
        torch.randint(vocab, (rows, columns), dtype=torch.int32),
        torch.randint(rows, (batch,), dtype=torch.int32),
        starts.int(),
        ends.int(),
    )


def one_text(tokens: list[int], *, behind: tuple[int, ...] = ()) -> Batch:
    """A single request with this text; what is behind its end is not its own."""

    def number(n: int) -> Tensor:
        return torch.tensor([n], dtype=torch.int32)

    text = torch.tensor([[*tokens, *behind]], dtype=torch.int32)
    return Batch(text, number(0), number(0), number(len(tokens)))


def outputs(batch: int, chains: int, depth: int) -> Chains:
    """Poisoned, to be written."""
    return Chains(
        tokens=torch.full((batch, chains, depth), POISON),
        matched=torch.full((batch, chains), POISON),
        scores=torch.full((batch, chains, depth), float(POISON)),
    )


def assert_same(found: Chains, wanted: Chains, rtol: float = 0.0) -> None:
    for name in ("tokens", "matched"):
        mine, expected = getattr(found, name).cpu(), getattr(wanted, name)
        assert mine.dtype == torch.int64 and torch.equal(mine, expected), name
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores.cpu(), wanted.scores, rtol=rtol, atol=0.0)
