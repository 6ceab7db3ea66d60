# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step hold trees: what the engines tell their attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_redrafter.ops.tree_attention import tree_attention

# Attribute under which an engine hangs a TreeStep on vLLM's attention metadata.
STEP_ATTRIBUTE = "redrafter_step"


@dataclass(frozen=True)
class TreeStep:
    """Which rows of one step our op computes.

    Attributes:
        request_index: int32 ``[R]``, row of the block table of each covered request.
        row_start: int32 ``[R]``, its first query row, the root.
        row_count: int32 ``[R]``, its query rows.
        context_lens: int32 ``[R]``, its cached tokens before the root.
        masks: int64 ``[T, words]``, which of its request's rows a row sees; T is at least the end
            of the last covered row and at most the step's rows.
        covers_all: no other rows are in this step, so vLLM's own kernel is not needed.
    """

    request_index: Tensor
    row_start: Tensor
    row_count: Tensor
    context_lens: Tensor
    masks: Tensor
    covers_all: bool


def attend(
    step: TreeStep,
    query: Tensor,
    output: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    scale: float,
    soft_cap: float | None,
    key_map: Tensor | None = None,
    value_map: Tensor | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
) -> None:
    """Compute the rows of trees of a step, into ``output``.

    Args:
        step: which rows.
        query, output: ``[rows, heads, head_dim]``, of all rows of the step.
        soft_cap: of the logits; None or 0 for none.
        sinks: ``[heads]`` of any floating type, or None.
        key_cache, value_cache, block_table, scale, key_map, value_map, window: see
            ``ops.tree_attention``.
    """
    # No rows behind the last tree: the operator's scratch memory grows with them.
    rows = step.masks.shape[0]
    tree_attention(
        output[:rows],
        query[:rows],
        key_cache,
        value_cache,
        key_map,
        value_map,
        block_table,
        step.request_index,
        step.row_start,
        step.row_count,
        step.context_lens,
        step.masks,
        scale,
        float(soft_cap or 0.0),
        window,
        None if sinks is None else sinks.detach().float(),
    )
