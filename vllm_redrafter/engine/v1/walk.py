# SPDX-License-Identifier: Apache-2.0
"""Exact walks through the trees of a batch, with vLLM's own sampler.

At each node the target's own token is drawn with the request's full sampling parameters; the walk
steps to the child that holds it, or stops and emits it. Whatever was drafted, the emitted tokens
are the target's: greedy output is unchanged, a seeded request consumes one draw per emitted token
exactly as without drafting, and an unseeded one follows the same law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.v1.logits_processors import without_custom
from vllm_redrafter.engine.v1.request_tree import RequestTree
from vllm_redrafter.ops.argmax_rows import argmax_rows

# What RejectionSampler.parse_output of vLLM drops.
PLACEHOLDER = -1

# (batch rows that still walk, their logits rows) -> the target's token for each of them.
Draw = Callable[[list[int], list[int]], list[int]]

# (batch row, its tokens so far) -> whether the request ends with the last of them.
Ends = Callable[[int, list[int]], bool]


@dataclass
class BatchWalk:
    """Where every request of a batch ended up.

    Attributes:
        tokens: emitted tokens per request: the accepted ones, then the target's next token.
        paths: accepted nodes per request, in order (1-based; the root is not among them).
    """

    tokens: list[list[int]]
    paths: list[list[int]]

    @classmethod
    def nowhere(cls, batch: int) -> BatchWalk:
        """Of requests without trees, whose tokens somebody else draws."""
        return cls([[] for _ in range(batch)], [[] for _ in range(batch)])

    def padded_tokens(self) -> Tensor:
        """``[B, deepest]`` int32, padded with PLACEHOLDER."""
        width = max(len(row) for row in self.tokens)
        rows = [row + [PLACEHOLDER] * (width - len(row)) for row in self.tokens]
        return torch.tensor(rows, dtype=torch.int32)


def walk_trees(
    trees: Sequence[RequestTree | None],
    first_row: Sequence[int],
    draw: Draw,
    ends: Ends = lambda i, said: False,
) -> BatchWalk:
    """Walk all requests together, one draw per depth.

    Args:
        trees: one per request, None where nothing was drafted.
        first_row: logits row of each request's root; node k is k rows behind it.
        draw: the target's tokens; only rows on a path are ever asked for.
        ends: a token with which a request ends is emitted, but its node is not accepted.
    """
    batch = len(trees)
    walk = BatchWalk([[] for _ in range(batch)], [[] for _ in range(batch)])
    nodes = [0] * batch
    walking = list(range(batch))
    while walking:
        drawn = draw(walking, [first_row[i] + nodes[i] for i in walking])
        still_walking = []
        for i, token in zip(walking, drawn, strict=True):
            walk.tokens[i].append(token)
            tree = trees[i]
            child = tree.child(nodes[i], token) if tree is not None else None
            if child is not None and not ends(i, walk.tokens[i]):
                walk.paths[i].append(child)
                nodes[i] = child
                still_walking.append(i)
        walking = still_walking
    return walk


class GreedyDraw:
    """The plain argmax of every row: what vLLM's sampler takes, ties included.

    Args:
        logits: ``[rows, vocab]``.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, walking: list[int], rows: list[int]) -> list[int]:
        wanted = torch.tensor(rows, dtype=torch.int64, device=self._logits.device)
        return argmax_rows(self._logits, wanted).tolist()


class SampledDraw:
    """The stock sampler with any sampling parameters; a context manager.

    Penalties, bad words and min_tokens read the live output lists of the requests, so the tokens
    of a walk are appended to them as it goes and taken off again at the end (vLLM appends them
    itself later).

    Args:
        logits: ``[rows, vocab]``, grammar masks applied; not modified.
        sampler: vLLM's ``Sampler``.
        metadata: its ``SamplingMetadata`` for the batch.
        output_token_ids: the live output list of each request.

    Attributes:
        logprobs: one LogprobsTensors per depth, a row per request; empty if none were asked for.
    """

    def __init__(
        self, logits: Tensor, sampler: Any, metadata: Any, output_token_ids: list[list[int]]
    ) -> None:
        self._logits = logits
        self._sampler = sampler
        # Its drafts are lists, not trees; what is drawn here is one token behind the outputs.
        self._metadata = replace(metadata, spec_token_ids=None)
        # Behind the first draw: requests that custom ones may change do not walk.
        self._processors = without_custom(metadata.logitsprocs)
        self._outputs = output_token_ids
        self._lengths = [len(ids) for ids in output_token_ids]
        self._rows: list[int] = []
        self._last: dict[int, int] = {}
        self.logprobs: list[Any] = []

    def __enter__(self) -> SampledDraw:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for ids, length in zip(self._outputs, self._lengths, strict=True):
            del ids[length:]

    def __call__(self, walking: list[int], rows: list[int]) -> list[int]:
        metadata = self._metadata
        if self._rows:
            self._accept_last(walking)
            metadata = self._restricted(walking)
        else:
            # The first draw is for every request, in batch order.
            self._rows = list(rows)
        for i, row in zip(walking, rows, strict=True):
            self._rows[i] = row
        output = self._sampler(logits=self._logits[self._rows], sampling_metadata=metadata)
        if output.logprobs_tensors is not None:
            self.logprobs.append(output.logprobs_tensors)
        sampled = output.sampled_token_ids[:, 0].tolist()
        self._last = {i: sampled[i] for i in walking}
        return [sampled[i] for i in walking]

    def _accept_last(self, walking: list[int]) -> None:
        """Requests that walk on accepted their last token: processors must count it."""
        for i in walking:
            self._outputs[i].append(self._last[i])
        for processor in self._processors.non_argmax_invariant:
            processor.update_state(None)

    def _restricted(self, walking: list[int]) -> Any:
        """The metadata without the generators of requests whose walk has ended.

        Their rows are computed and thrown away, but a seeded request must draw once per emitted
        token and not once more.
        """
        generators = self._metadata.generators
        return replace(
            self._metadata,
            generators={i: generators[i] for i in walking if i in generators},
            logitsprocs=self._processors,
            # Requests with a thinking budget get no draft and so never walk this far.
            thinking_budget_state_holder=None,
        )


def stack_logprobs(levels: list[Any]) -> Any | None:
    """Per-depth LogprobsTensors of a batch as one, request by request, as parse_output reads it.

    Args:
        levels: D triples of tensors with B rows each.

    Returns:
        one triple with B x D rows (request-major), or None if there are no levels.
    """
    if len(levels) <= 1:
        return levels[0] if levels else None
    fields = ("logprob_token_ids", "logprobs", "selected_token_ranks")
    stacked = [
        torch.stack([getattr(level, name) for level in levels], dim=1).flatten(0, 1)
        for name in fields
    ]
    return type(levels[0])(*stacked)
