# SPDX-License-Identifier: Apache-2.0
"""The order of the data, and one group of sequences as positions to train on.

Position t of a sequence x is an anchor: context h_t, known token x[t+1], drafted x[t+2], ...,
x[t+1+K]; the teacher of offset i is the target's distribution at t+1+i. The known token and all
that is drafted are the target's own words, never the prompt's.

Positions of one step come from all over a group, so a group should be large: a step whose positions
come from a few sequences pulls the weights towards just these.

The order depends on the seed, the epoch and the number of processes, and on nothing else, so a run
can go on at any step. Each process has a fixed share of the sequences: what it keeps of them in
memory serves it in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.training.dataset import Dataset
from vllm_redrafter.training.target import Target

# Neighbouring anchors that stay together: they share rows of the teacher, which cost as much as
# those of the drafter.
RUN = 4


def num_anchors(answer: Tensor) -> int:
    """Anchors of one sequence: ``answer`` ``[n]`` bool marks the target's words."""
    return int((answer[1:-1] & answer[2:]).sum())


def split(dataset: Dataset, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Usable sequences, to train on and held out; none is held out if there are fewer than two."""
    usable = [i for i in range(len(dataset)) if num_anchors(dataset.answer[i])]
    order = torch.randperm(len(usable), generator=_generator(seed, 0, 0)).tolist()
    count = min(round(held_out * len(usable)), len(usable) - 1)
    if held_out > 0 and len(usable) > 1:
        count = max(count, 1)
    chosen = {usable[i] for i in order[: max(count, 0)]}
    return [i for i in usable if i not in chosen], sorted(chosen)


def pack(order: Sequence[int], lengths: Sequence[int], group_tokens: int) -> list[list[int]]:
    """Cut ``order`` into groups of at most ``group_tokens`` tokens, but at least one sequence."""
    groups: list[list[int]] = []
    room = 0
    for i in order:
        if not groups or lengths[i] > room:
            groups.append([])
            room = group_tokens
        groups[-1].append(i)
        room -= lengths[i]
    return groups


@dataclass(frozen=True)
class Place:
    """Where a step's data lies: minibatch ``part`` of ``parts`` of a group, in an epoch."""

    epoch: int
    group: int
    members: tuple[int, ...]
    part: int
    parts: int


class Schedule:
    """Every step's data, for one of several processes.

    Args:
        members: sequences to train on.
        anchors: per sequence of the dataset, its anchors.
        lengths: per sequence of the dataset, its tokens.
    """

    def __init__(
        self,
        members: Sequence[int],
        anchors: Sequence[int],
        lengths: Sequence[int],
        *,
        group_tokens: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._members, self._anchors, self._lengths = list(members), anchors, lengths
        self._group_tokens, self._batch_size = group_tokens, batch_size
        self._seed, self._rank, self._world = seed, rank, world

    def epoch(self, epoch: int) -> list[Place]:
        """The steps of one epoch; equally many for every process, group by group.

        Processes wait for one another at every step, and the first of a group has to wait for
        hidden states: they must all be at that point at once.
        """
        places = []
        shares = [self._groups(epoch, rank) for rank in range(self._world)]
        for n, groups in enumerate(zip(*shares, strict=False)):
            totals = [sum(self._anchors[i] for i in group) for group in groups]
            parts = max(1, round(sum(totals) / len(totals) / self._batch_size))
            parts = min(parts, -(-min(totals) // RUN))
            mine = tuple(groups[self._rank])
            number = n * self._world + self._rank
            places += [Place(epoch, number, mine, part, parts) for part in range(parts)]
        return places

    def _groups(self, epoch: int, rank: int) -> list[list[int]]:
        """The groups of one process's share of the sequences."""
        members = self._members[rank :: self._world]
        order = torch.randperm(len(members), generator=_generator(self._seed, 1, epoch))
        return pack([members[i] for i in order.tolist()], self._lengths, self._group_tokens)

    def steps(self, epochs: float) -> int:
        """Steps in ``epochs`` passes; a part of a pass counts in proportion."""
        whole = int(epochs)
        count = sum(len(self.epoch(e)) for e in range(whole))
        if epochs > whole:
            count += round((epochs - whole) * len(self.epoch(whole)))
        return count

    def places(self, first: int) -> Iterator[Place]:
        """Steps from number ``first`` on, without end."""
        epoch = 0
        while True:
            places = self.epoch(epoch)
            if not places:
                return
            yield from places[first:]
            first = max(0, first - len(places))
            epoch += 1

    def positions(self, place: Place, total: int) -> Tensor:
        """Which of a group's ``total`` anchors belong to this step: indices int64, rising."""
        generator = _generator(self._seed, 2, place.epoch, place.group)
        runs = torch.randperm(-(-total // RUN), generator=generator)
        runs = runs.tensor_split(place.parts)[place.part].sort().values
        at = (runs[:, None] * RUN + torch.arange(RUN)).flatten()
        return at[at < total]


@dataclass(frozen=True)
class Group:
    """Some sequences laid end to end, with what all their offsets need.

    Attributes:
        hidden: ``[T, H]``.
        anchor: ``[A]`` int64, row of each anchor's context.
        tokens: ``[A, K + 1]`` int64, the known token and what follows; 0 behind the end.
        valid: ``[A, K]`` bool, which offsets have a token to predict.
    """

    hidden: Tensor
    anchor: Tensor
    tokens: Tensor
    valid: Tensor

    def teacher_rows(self, at: Tensor) -> Tensor:
        """``[len(at), K]``: the rows of ``hidden`` that say what follows each drafted token.

        Where an anchor is not ``valid`` they belong to no or another sequence.
        """
        rows = self.anchor[at][:, None] + 1 + torch.arange(self.valid.shape[1], device=at.device)
        return rows.clamp(max=len(self.hidden) - 1)


def make_group(
    target: Target,
    dataset: Dataset,
    members: Sequence[int],
    *,
    offsets: int,
    cache: dict[int, Tensor] | None = None,
) -> Group:
    """Compute (or read) the hidden states of some sequences.

    Args:
        cache: computed hidden states by sequence number, filled here; None: compute them every
            time. Those that are stored are read.
    """
    device = target.device
    hidden = torch.cat(_states(target, dataset, members, cache))
    flat = torch.cat([dataset.tokens[i].long() for i in members])
    # A gap of `offsets` False behind each sequence would do the same; shifting per sequence is
    # simpler than laying them out twice.
    reach = []
    for i in members:
        answer = dataset.answer[i]
        padded = torch.cat([answer, torch.zeros(offsets + 2, dtype=torch.bool)])
        steps = torch.stack([padded[1 + j : 1 + j + len(answer)] for j in range(offsets + 1)], 1)
        reach.append(steps.long().cumprod(1).bool())
    reached = torch.cat(reach)
    anchor = reached[:, 1].nonzero().flatten()
    valid = reached[anchor, 1:]
    columns = anchor[:, None] + 1 + torch.arange(offsets + 1)
    tokens = flat[columns.clamp(max=len(flat) - 1)]
    tokens[:, 1:].masked_fill_(~valid, 0)

    # inference-mode tensors cannot be saved for a backward pass: clone outside of it.
    return Group(
        hidden=hidden.clone(),
        anchor=anchor.to(device),
        tokens=tokens.to(device),
        valid=valid.to(device),
    )


def _states(
    target: Target, dataset: Dataset, members: Sequence[int], cache: dict[int, Tensor] | None
) -> list[Tensor]:
    """Per sequence ``[n, H]``, in the target's type and on its device."""
    found: dict[int, Tensor] = {}
    for i in members:
        stored = None if dataset.hidden is None else dataset.hidden(i)
        if stored is not None:
            found[i] = stored.to(target.device, target.head.dtype)
        elif cache is not None:
            if i not in cache:
                # Alone: values must not depend on the group in which it was first met, or a
                # resumed run would differ.
                cache[i] = target.hidden([dataset.tokens[i].long()])[0]
            found[i] = cache[i]
    missing = [i for i in members if i not in found]
    computed = target.hidden([dataset.tokens[i].long() for i in missing])
    found |= zip(missing, computed, strict=True)
    return [found[i] for i in members]


def _generator(*numbers: int) -> torch.Generator:
    """A generator whose seed mixes all numbers (a sum would make epochs repeat other seeds)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 61)
    return torch.Generator().manual_seed(seed)
