# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step hold trees, in tensors that stay where they are.

A full CUDA graph reads what its capture read, at the same addresses: block tables, which are
vLLM's, and from here the requests, their first rows and row counts, context lengths and masks. All
of them are written before the forward pass, by operators that read nothing back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_redrafter.engine.tree_step import TreeStep
from vllm_redrafter.engine.v2.tree_store import TreeStore


class StepRows:
    """Makes the ``TreeStep`` of a step.

    Args:
        trees: the topology of R request slots.
        max_rows: the most query rows of a step.
        row_counts: rows per request that steps will have where all requests have the same number;
            repetitions do not matter.

    Attributes:
        request_index: ``[R]`` int32, 0 to R - 1.
        context_lens: ``[R]`` int32.
        masks: ``[max_rows, words]`` int64.
    """

    def __init__(self, trees: TreeStore, max_rows: int, row_counts: Sequence[int]) -> None:
        device, slots = trees.masks.device, trees.masks.shape[0]
        self.trees = trees
        self.request_index = torch.arange(slots, dtype=torch.int32, device=device)
        self.context_lens = torch.zeros(slots, dtype=torch.int32, device=device)
        self.masks = torch.zeros(max_rows, trees.masks.shape[2], dtype=torch.int64, device=device)
        self._layouts = {rows: self._layout(rows) for rows in sorted(set(row_counts))}

    def _layout(self, rows: int) -> tuple[Tensor, Tensor]:
        """``[R]`` int32 each: first row and row count of requests that have ``rows`` rows each."""
        return self.request_index * rows, torch.full_like(self.request_index, rows)

    def uniform(self, slots: Tensor, seq_lens: Tensor, rows: int, requests: int) -> TreeStep:
        """A step in which every request has ``rows`` rows, a root and its nodes.

        What a graph was captured with for ``requests`` serves every later step of that size.

        Args:
            slots: ``[B]`` int64, request slots in the order of the batch; B <= ``requests``.
            seq_lens: ``[requests]`` int32, tokens up to the last row; 0 for padding.
            rows: 1 to N + 1.
            requests: with padding. A padding request has no context, and its rows see themselves
                alone, so that no softmax is empty.
        """
        if rows not in self._layouts:
            self._layouts[rows] = self._layout(rows)
        row_start, row_count = self._layouts[rows]
        real = slots.shape[0]
        context_lens = self.context_lens[:requests]
        torch.sub(seq_lens[:requests], rows, out=context_lens)
        masks = self.masks[: requests * rows].view(requests, rows, -1)
        torch.index_select(self.trees.masks[:, :rows], 0, slots, out=masks[:real])
        if real < requests:
            context_lens.clamp_(min=0)
            masks[real:] = self.trees.alone[:rows]
        return TreeStep(
            request_index=self.request_index[:requests],
            row_start=row_start[:requests],
            row_count=row_count[:requests],
            context_lens=context_lens,
            masks=masks.view(requests * rows, -1),
            covers_all=True,
        )

    def mixed(self, input_batch: Any) -> TreeStep | None:
        """A step with other rows too; it never is a graph's, so its counts may lie anywhere.

        A request that is still prefilling may carry placeholder nodes behind several prompt
        tokens: those are rejected anyway, so its rows are computed as a chain, by vLLM.

        Args:
            input_batch: vLLM's ``InputBatch``, with drafts.

        Returns:
            None if no request's rows are a root and its nodes.
        """
        # The host knows from the schedule what the device knows from its counts.
        is_tree = input_batch.num_scheduled_tokens == 1 + input_batch.num_draft_tokens_per_req
        if not is_tree.any():
            return None
        # vLLM puts drafts first: nothing behind the last tree is given to our operator, whose
        # scratch memory grows with the rows that it is given.
        requests = int(np.flatnonzero(is_tree)[-1]) + 1
        total = int(input_batch.query_start_loc_np[requests])
        logits = int(input_batch.cu_num_logits_np[requests])
        starts = input_batch.query_start_loc[: requests + 1]
        rows = starts[1:] - starts[:-1]
        ends = input_batch.cu_num_logits[: requests + 1]
        masks = self.masks[:total]
        slots = input_batch.expanded_idx_mapping[:logits]
        nodes = input_batch.expanded_local_pos[:logits].long()
        masks.index_copy_(0, input_batch.logits_indices[:logits], self.trees.masks[slots, nodes])
        return TreeStep(
            request_index=self.request_index[:requests],
            row_start=starts[:-1],
            row_count=torch.where(rows == ends[1:] - ends[:-1], rows, 0),
            context_lens=input_batch.seq_lens[:requests] - rows,
            masks=masks,
            covers_all=bool(is_tree.all()),
        )
