# SPDX-License-Identifier: Apache-2.0
"""Exact walks through the trees of a batch, with vLLM's own sampler.

At each node the target's own token is drawn with the request's full sampling parameters; the walk
steps to the child that holds it, or stops and emits it. Whatever was drafted, the emitted tokens
are the target's: greedy output is unchanged, a seeded request consumes one draw per emitted token
exactly as without drafting, and an unseeded one follows the same law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.v1.request_tree import RequestTree

# What RejectionSampler.parse_output of vLLM drops.
PLACEHOLDER = -1


@dataclass
class BatchWalk:
    """Where every request of a batch ended up.

    Attributes:
        tokens: emitted tokens per request: the accepted ones, then the target's next token.
        paths: accepted nodes per request, in order (1-based; the root is not among them).
        logprobs: one LogprobsTensors per depth, rows by request; empty if none were asked for.
    """

    tokens: list[list[int]]
    paths: list[list[int]]
    logprobs: list[Any]

    def padded_tokens(self) -> Tensor:
        """``[B, deepest]`` int32, padded with PLACEHOLDER."""
        width = max(len(row) for row in self.tokens)
        rows = [row + [PLACEHOLDER] * (width - len(row)) for row in self.tokens]
        return torch.tensor(rows, dtype=torch.int32)


def walk_argmax(
    argmax: Sequence[int], first_row: Sequence[int], trees: Sequence[RequestTree | None]
) -> BatchWalk:
    """The walk when every request takes the plain argmax of its logits.

    Args:
        argmax: the target's token at every logits row.
        first_row: logits row of each request's root; node k is k rows behind it.
        trees: one per request, None where nothing was drafted.
    """
    tokens, paths = [], []
    for start, tree in zip(first_row, trees, strict=True):
        token = argmax[start]
        emitted, path = [token], []
        node = tree.child(0, token) if tree else None
        while node is not None:
            path.append(node)
            token = argmax[start + node]
            emitted.append(token)
            node = tree.child(node, token)  # type: ignore[union-attr]
        tokens.append(emitted)
        paths.append(path)
    return BatchWalk(tokens, paths, [])


def walk_by_level(
    logits: Tensor,
    first_row: Sequence[int],
    trees: Sequence[RequestTree | None],
    sampler: Any,
    metadata: Any,
    output_token_ids: list[list[int]],
) -> BatchWalk:
    """The walk with any sampling parameters: one call of the stock sampler per depth.

    Args:
        logits: ``[rows, vocab]``, grammar masks applied; not modified.
        first_row, trees: see ``walk_argmax``.
        sampler: vLLM's ``Sampler``.
        metadata: its ``SamplingMetadata`` for the batch.
        output_token_ids: the live output lists of the requests. Penalties, bad words and
            min_tokens read them, so accepted tokens are appended while walking and taken off again
            before returning (vLLM appends them itself later).
    """
    batch = len(trees)
    first = torch.tensor(first_row, device=logits.device)
    nodes = [0] * batch
    walking = list(range(batch))
    walk = BatchWalk([[] for _ in range(batch)], [[] for _ in range(batch)], [])
    lengths = [len(ids) for ids in output_token_ids]
    try:
        while walking:
            rows = first + torch.tensor(nodes, device=logits.device)
            output = sampler(
                logits=logits[rows],
                sampling_metadata=_restricted(metadata, walking, deeper=bool(walk.tokens[walking[0]])),
            )
            if output.logprobs_tensors is not None:
                walk.logprobs.append(output.logprobs_tensors)
            sampled = output.sampled_token_ids[:, 0].tolist()
            still_walking = []
            for i in walking:
                token = sampled[i]
                walk.tokens[i].append(token)
                tree = trees[i]
                child = tree.child(nodes[i], token) if tree is not None else None
                if child is not None:
                    walk.paths[i].append(child)
                    nodes[i] = child
                    output_token_ids[i].append(token)
                    still_walking.append(i)
            walking = still_walking
            if walking:
                _refresh_processors(metadata)
    finally:
        for ids, length in zip(output_token_ids, lengths, strict=True):
            del ids[length:]
    return walk


def _restricted(metadata: Any, walking: list[int], deeper: bool) -> Any:
    """``metadata`` for the requests that still walk.

    The others' rows are computed and thrown away, but must not draw from their generators: a
    seeded request draws once per emitted token.
    """
    if not deeper:
        return metadata
    return replace(
        metadata,
        generators={i: metadata.generators[i] for i in walking if i in metadata.generators},
        # Requests with a thinking budget get no draft and so never walk this far.
        thinking_budget_state_holder=None,
    )


def _refresh_processors(metadata: Any) -> None:
    """Let processors that count output tokens (min_tokens) see the tokens accepted so far."""
    for processor in metadata.logitsprocs.non_argmax_invariant:
        processor.update_state(None)


def stack_logprobs(levels: list[Any]) -> Any | None:
    """Per-depth LogprobsTensors of a batch as one, request by request, as parse_output reads it.

    Args:
        levels: D tensors triples with B rows each.

    Returns:
        one triple with B x D rows (request-major), or None if there are no levels.
    """
    if not levels:
        return None
    if len(levels) == 1:
        return levels[0]
    fields = ("logprob_token_ids", "logprobs", "selected_token_ranks")
    stacked = [
        torch.stack([getattr(level, name) for level in levels], dim=1).flatten(0, 1)
        for name in fields
    ]
    return type(levels[0])(*stacked)
