# SPDX-License-Identifier: Apache-2.0
"""Where requests end inside their trees, on the device; ``v1.ending`` says why that matters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from vllm_redrafter.tree.walk import NO_NODE, Walk

# Stop tokens of one request that a walk can look for, as many as vLLM holds back for min_tokens.
# Requests with more get no draft.
MOST_STOP_TOKENS = 128

# Stands in rows of stop tokens behind the last; no token is this.
_NO_TOKEN = -1

# Longer than any text.
_NO_LIMIT = 2**62


class Endings:
    """After which tokens nothing follows, for R request slots. Nothing is read by the host.

    Args:
        slots: R.
        device: where.

    Attributes:
        stop_tokens: ``[R, MOST_STOP_TOKENS]`` int64, filled up with -1.
        limits: ``[R]`` int64, a text of so many tokens is complete.
        lengths: ``[R]`` integers, tokens of every text now, the root's included; vLLM's own.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        shape = slots, MOST_STOP_TOKENS
        self.stop_tokens = torch.full(shape, _NO_TOKEN, dtype=torch.int64, device=device)
        self.limits = torch.full((slots,), _NO_LIMIT, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        # What stands in the rows: most requests have the stop tokens of the one before.
        self._kept: list[tuple[int, ...]] = [()] * slots

    def reset(self, slot: int, stop_tokens: Collection[int], limit: int | None) -> None:
        """A new request takes ``slot``.

        Args:
            stop_tokens: at most MOST_STOP_TOKENS.
            limit: tokens of the longest text that it may have, prompt included; None for any.
        """
        self.limits[slot].fill_(_NO_LIMIT if limit is None else limit)
        kept = tuple(sorted(stop_tokens))
        if kept != self._kept[slot]:
            # By launches alone: a copy of a list to a GPU would wait for it.
            self.stop_tokens[slot].fill_(_NO_TOKEN)
            for column, token in enumerate(kept):
                self.stop_tokens[slot, column].fill_(token)
            self._kept[slot] = kept

    def cut(self, slots: Tensor, found: Walk, said: Tensor) -> Walk:
        """The walks without what lies behind an end: such a token is said, but not accepted.

        Args:
            slots: ``[B]`` integers, request slots.
            found: the walks.
            said: ``[B, D + 1]`` int64, the target's tokens along them; behind the last anything.
        """
        columns = torch.arange(said.shape[1], device=said.device)
        left = self.limits[slots] - self.lengths[slots]
        stops = (said[:, :, None] == self.stop_tokens[slots][:, None, :]).any(-1)
        goes_on = ~stops & (columns + 1 < left[:, None])
        # How many tokens are said before the first that ends the request.
        before = goes_on.long().cumprod(1).sum(1)
        accepted = found.num_accepted.minimum(before)
        path = torch.where(columns[:-1] < accepted[:, None], found.path, NO_NODE)
        last = (accepted - 1).clamp(min=0)[:, None]
        # Of a tree without depth there is no path to look at.
        end = path.gather(1, last)[:, 0] if path.shape[1] else found.last_node
        return replace(
            found,
            path=path,
            num_accepted=accepted,
            last_node=torch.where(accepted > 0, end, 0),
            next_token=said.gather(1, accepted[:, None])[:, 0],
        )
