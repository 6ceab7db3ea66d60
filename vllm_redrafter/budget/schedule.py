# SPDX-License-Identifier: Apache-2.0
"""Nodes per request by batch size, for engines that verify the same number for all of them.

All of it is computed, not measured: how much nodes bring comes from a replay of one model's
answers, and what they cost from two numbers of a GPU's data sheet. It is there so that nobody
loses under load who asked for nothing; who measures can say better by vLLM's own key,
``num_speculative_tokens_per_batch_size``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# (nodes, tokens per step) of SmolLM2-135M's answers to MT-bench that do not loop, greedy, bf16.
PROFILE = ((0, 1.0), (3, 2.19), (7, 2.68), (15, 3.01), (24, 3.13))

# Numbers of nodes that a schedule may hold: each is a family of CUDA graphs.
LEVELS = (0, 1, 3, 7, 15, 24, 32, 48, 64)

# Running requests up to which a schedule is made where vLLM's limit is not known yet.
MOST_REQUESTS = 1024

# (first batch size, last, nodes), as vLLM's key holds them.
Ranges = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Attributes:
        bandwidth: bytes a second of its memory.
        flops: dense bfloat16 operations a second.
    """

    bandwidth: float
    flops: float


A100 = Device(2.0e12, 312e12)

# By a part of the device's name; the first that fits. An unknown one counts as an A100, which of
# all of these turns compute-bound at the fewest rows.
DEVICES = (
    ("H200", Device(4.8e12, 989e12)),
    ("H100", Device(3.35e12, 989e12)),
    ("A100", A100),
    ("L40S", Device(0.864e12, 362e12)),
    ("RTX 4090", Device(1.008e12, 165e12)),
)


def device_named(name: str) -> Device:
    """What is known of a device, computed, not measured; an A100's numbers for others."""
    return next((device for part, device in DEVICES if part in name), A100)


@dataclass(frozen=True)
class Roofline:
    """Seconds of a pass over some weights, computed, not measured.

    The longer of reading the weights once and of the arithmetic of all rows. What is left out, as
    reading the KV cache, costs the same with few nodes and with many.

    Attributes:
        parameters: of matrix products.
        weight_bytes: of them.
        device: where.
    """

    parameters: float
    weight_bytes: float
    device: Device

    def __call__(self, rows: int) -> float:
        arithmetic = 2 * self.parameters * rows / self.device.flops
        return max(self.weight_bytes / self.device.bandwidth, arithmetic)

    @property
    def most_rows(self) -> int:
        """With more rows than this a pass takes longer than with one."""
        reading = self.weight_bytes / self.device.bandwidth
        return int(reading * self.device.flops / (2 * self.parameters))


def expected_tokens(nodes: int, profile: Sequence[tuple[int, float]] = PROFILE) -> float:
    """Tokens of a step with so many nodes, between and behind known numbers.

    Linear in the logarithm of rows, so that every further node brings less than the one before.
    """
    pairs = zip(profile, profile[1:], strict=False)
    (few, low), (many, high) = next(
        (pair for pair in pairs if nodes <= pair[1][0]), (profile[-2], profile[-1])
    )
    slope = (high - low) / math.log((1 + many) / (1 + few))
    return low + slope * math.log((1 + nodes) / (1 + few))


def gains(nodes: int) -> list[float]:
    """Probability of the best, the second best, ... node, by ``PROFILE``."""
    tokens = [expected_tokens(count) for count in range(nodes + 1)]
    return [after - before for before, after in zip(tokens, tokens[1:], strict=False)]


def schedule(
    cost: Callable[[int], float],
    draft: Callable[[int], float],
    probabilities: Sequence[float],
    most_requests: int,
    *,
    levels: Iterable[int] | None = None,
    most_rows: int | None = None,
) -> Ranges:
    """The nodes per request that give the most tokens per second, by running requests.

    Args:
        cost: of a step with so many rows, in any unit.
        draft: of drafting for so many requests, in the same one; without nodes nothing is drafted.
        probabilities: of a request's best, second best, ... node; their number is the most nodes.
        most_requests: B runs from 1 to this.
        levels: numbers of nodes to choose from; None for all.
        most_rows: a step that drafts has no more; None for no limit.

    Returns:
        Ranges that cover all batch sizes. Nodes never rise with the batch.
    """
    tokens = [1.0]
    for probability in probabilities:
        tokens.append(tokens[-1] + probability)
    choices = sorted({0, *(range(len(tokens)) if levels is None else levels)})
    choices = [nodes for nodes in choices if nodes < len(tokens)]

    def rate(batch: int, nodes: int) -> float:
        seconds = cost(batch * (1 + nodes)) + (draft(batch) if nodes else 0.0)
        return batch * tokens[nodes] / seconds

    ranges: list[tuple[int, int, int]] = []
    for batch in range(1, most_requests + 1):
        limit = ranges[-1][2] if ranges else choices[-1]
        if most_rows is not None:
            limit = min(limit, max(0, most_rows // batch - 1))
        allowed = [nodes for nodes in choices if nodes <= limit]
        # Of equal rates the fewest nodes.
        best = max(allowed, key=lambda nodes: rate(batch, nodes))
        if ranges and ranges[-1][2] == best:
            ranges[-1] = (ranges[-1][0], batch, best)
        else:
            ranges.append((batch, batch, best))
    return tuple(ranges)


def computed_schedule(
    target: Roofline, drafter: Roofline, beam_width: int, draft_length: int, nodes: int,
    most_requests: int,
) -> Ranges:  # fmt: skip
    """A schedule by rooflines; computed, not measured.

    Args:
        target, drafter: a pass of each; the drafter's is one depth.
        beam_width: W.
        draft_length: L.
        nodes: N.
        most_requests: as for ``schedule``.
    """

    def draft(batch: int) -> float:
        return drafter(batch) + (draft_length - 1) * drafter(batch * beam_width)

    return schedule(
        target, draft, gains(nodes), most_requests, levels=(*LEVELS, nodes),
        most_rows=target.most_rows,
    )  # fmt: skip
