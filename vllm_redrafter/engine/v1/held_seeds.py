# SPDX-License-Identifier: Apache-2.0
"""Seeded requests whose prompt is prefilled in parts, on a CPU.

vLLM samples a token for every row of a step. What a prompt's first parts give is thrown away, and
the request's generator is then set back by an offset, which torch's CPU generator does not have:
plain vLLM's engine ends there ("CPU Generator does not use offset"). Here such a generator is out
of reach while the step samples and keeps its books, so it draws nothing and has nothing to set
back: the request says what it says when its prompt is prefilled at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HeldSeeds:
    """Generators that are kept from one step's sampling."""

    def __init__(self) -> None:
        self._held: dict[int, torch.Generator] = {}

    def hold(self, generators: dict[int, torch.Generator], rows: Iterable[int]) -> None:
        """Take the generators of batch ``rows`` out of ``generators``, the batch's own mapping."""
        for row in rows:
            if row in generators:
                self._held[row] = generators.pop(row)

    def give_back(self, generators: dict[int, torch.Generator]) -> None:
        """Put them back; the batch's rows must be the same as in ``hold``."""
        generators.update(self._held)
        self._held = {}
