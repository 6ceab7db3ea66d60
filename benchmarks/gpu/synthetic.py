# SPDX-License-Identifier: Apache-2.0
"""Acceptance as an input: the whole pipeline runs, and only the decision is replaced.

With dummy weights nothing would be accepted, so timing says nothing about moves and lengths. Here
the draft, the tree, the target's pass over all rows, its sampler, the walk and the KV moves are the
real ones. Between the sampler and the walk, one kernel rewrites the target's tokens along a path
that is drawn from given rates: the walk then finds what it was told to find. Outputs are not the
target's; this is for timing only.

Where the tree lacks the drawn child, the path ends: fewer tokens are accepted than the rates say,
and the engine's own counters say how many were.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

# How often the best, second, ... child of an accepted node is the accepted one.
CHILD_RANKS = (0.8, 0.15, 0.05)


@triton.jit
def decide_kernel(
    drawn_ptr,
    tokens_ptr,
    first_row_ptr,
    slots_ptr,
    parents_ptr,
    parents_stride,
    num_nodes_ptr,
    rates_ptr,
    ranks_ptr,
    seed,
    offset,
    vocab,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One request each: its accepted path, written as the target's tokens."""
    request = tl.program_id(0)
    first = tl.load(first_row_ptr + request).to(tl.int64)
    rows = tl.load(first_row_ptr + request + 1).to(tl.int64) - first
    slot = tl.load(slots_ptr + request).to(tl.int64)
    count = tl.minimum(tl.load(num_nodes_ptr + slot), rows)
    columns = tl.arange(0, BLOCK)
    real = columns < count
    parents = tl.load(parents_ptr + slot * parents_stride + columns, mask=real, other=-2)
    tokens = tl.load(tokens_ptr + first + columns, mask=real, other=-1).to(tl.int64)
    node = tl.full((), 0, tl.int64)
    going = tl.full((), 1, tl.int32)
    for depth in range(DEPTH):
        at = offset + (request * DEPTH + depth) * 2
        accepted = tl.rand(seed, at) < tl.load(rates_ptr + depth)
        draw = tl.rand(seed, at + 1)
        rank = tl.full((), 1, tl.int32)
        for i in range(RANKS):
            rank += (draw >= tl.load(ranks_ptr + i)).to(tl.int32)
        children = real & (parents == node)
        chosen = children & (tl.cumsum(children.to(tl.int32), 0) == rank)
        found = tl.sum(chosen.to(tl.int32), 0)
        going = going * found * accepted.to(tl.int32)
        token = tl.sum(tl.where(chosen, tokens, 0), 0)
        tl.store(drawn_ptr + first + node, token, mask=going > 0)
        node = tl.where(going > 0, tl.sum(tl.where(chosen, columns, 0), 0).to(tl.int64), node)
    # Where the path ends, the target's token must be none of the drafted ones.
    children = real & (parents == node)
    last = tl.load(drawn_ptr + first + node)
    while tl.sum((children & (tokens == last)).to(tl.int32), 0) > 0:
        last = (last + 1) % vocab
    tl.store(drawn_ptr + first + node, last)


def conditional(rates: Sequence[float]) -> list[float]:
    """Rates given that the depth before was accepted.

    Args:
        rates: share of drafts with at least 1, 2, ... accepted nodes.

    Raises:
        ValueError: rates that are no such shares.
    """
    before, out = 1.0, []
    for rate in rates:
        if not 0.0 <= rate <= before:
            raise ValueError(
                f"acceptance rates {list(rates)} must lie in 0 to 1 and must not increase."
            )
        out.append(rate / before if before else 0.0)
        before = rate
    return out


def rates_for(mean: float, depth: int) -> list[float]:
    """Rates with the same chance at every depth, such that ``mean`` nodes are accepted on average.

    Raises:
        ValueError: more than a path holds.
    """
    if not 0.0 <= mean <= depth:
        raise ValueError(f"{mean} accepted nodes do not fit a path of {depth}.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if sum(middle**i for i in range(1, depth + 1)) < mean else (low, middle)
        )
    return [high**i for i in range(1, depth + 1)]


class SyntheticAcceptance:
    """Decides for a ``TreeSampler``, in place of the comparison with the target's tokens.

    Args:
        trees: the sampler's ``TreeStore``.
        rates: share of drafts with at least 1, 2, ... accepted nodes.
        ranks: shares of the best, second, ... child.
        seed: of all decisions.
        vocab: size of the vocabulary.
        device: of the trees.
    """

    def __init__(
        self,
        trees: Any,
        rates: Sequence[float],
        ranks: Sequence[float],
        seed: int,
        vocab: int,
        device: torch.device,
    ) -> None:
        cumulative = torch.tensor(ranks, dtype=torch.float64).cumsum(0)
        if abs(float(cumulative[-1]) - 1.0) > 1e-6:
            raise ValueError(f"shares {list(ranks)} of the children must add up to 1.")
        self.trees, self.seed, self.vocab = trees, seed, vocab
        self.rates = torch.tensor(conditional(rates), dtype=torch.float32, device=device)
        self.ranks = cumulative[:-1].float().to(device)
        self.offset = 0

    def decide(self, drawn: Tensor, tokens: Tensor, first_row: Tensor, slots: Tensor) -> None:
        """Rewrite ``drawn`` so that the walk accepts what the rates say.

        Args:
            drawn: ``[rows]`` int64, the target's token at every row; changed.
            tokens: ``[rows]``, the token that every row was computed from.
            first_row: ``[B + 1]``, first row of every request.
            slots: ``[B]``, where its tree lies.
        """
        requests, depth = slots.shape[0], self.rates.shape[0]
        decide_kernel[(requests,)](
            drawn, tokens, first_row, slots,
            self.trees.parents, self.trees.parents.stride(0), self.trees.num_nodes,
            self.rates, self.ranks, self.seed, self.offset, self.vocab,
            DEPTH=depth,
            RANKS=self.ranks.shape[0],
            BLOCK=triton.next_power_of_2(self.trees.nodes + 1),
        )  # fmt: skip
        # 32 bits: more decisions than any run makes.
        self.offset += 2 * requests * depth

    def install(self, sampler: Any, clock: Any) -> None:
        """Put this between the sampler and the walk of one engine; ``clock`` times it apart."""
        draw = sampler._draw

        def decided(_: Any, rows: Any, want_logprobs: bool) -> Any:
            drawn, processed = draw(rows, want_logprobs)
            with clock.span("decision"):
                self.decide(drawn, rows.tokens, rows.ends, rows.slots)
            return drawn, processed

        sampler._draw = types.MethodType(decided, sampler)
