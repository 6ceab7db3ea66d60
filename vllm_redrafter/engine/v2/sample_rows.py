# SPDX-License-Identifier: Apache-2.0
"""What is sampled in one go: the logits rows of consecutive requests of a step.

vLLM's sampler copies the logits to float32 where a request has sampling parameters. A tree has a
row per node, so this copy is bounded as vLLM's own speculative sampler bounds it: by chunks of
whole requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class SampleRows:
    """Logits rows of B requests; a request's rows are its root's and its scheduled nodes'.

    Attributes:
        logits: ``[rows, V]``.
        tokens: ``[rows]``, the token that each row was computed from.
        positions: ``[rows]`` int64, by depth.
        slots: ``[B]`` int64, request slots; ``slots_np`` on the host.
        row_slots: ``[rows]`` int64, the request slot of each row.
        row_nodes: ``[rows]`` int32, the node of each row.
        ends: ``[B + 1]`` int32, where each request's rows begin, and the end; ``ends_np`` on the
            host.
        seq_lens_np: ``[B]``, at least the tokens up to a request's last row.
        invalid: ``[rows]`` bool, nodes that a grammar did not check; None without grammars.
    """

    logits: Tensor
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    slots_np: np.ndarray
    row_slots: Tensor
    row_nodes: Tensor
    ends: Tensor
    ends_np: np.ndarray
    seq_lens_np: np.ndarray
    invalid: Tensor | None

    @classmethod
    def of(
        cls, logits: Tensor, input_batch: Any, positions: Tensor, invalid: Tensor | None
    ) -> SampleRows:
        """All rows of a step.

        Args:
            logits: ``[rows, V]``.
            input_batch: vLLM's ``InputBatch``.
            positions: ``[T]`` int64, of all query rows.
            invalid: as above.
        """
        rows = input_batch.logits_indices
        return cls(
            logits=logits,
            tokens=input_batch.input_ids[rows],
            positions=positions[rows],
            slots=input_batch.idx_mapping,
            slots_np=input_batch.idx_mapping_np,
            row_slots=input_batch.expanded_idx_mapping,
            row_nodes=input_batch.expanded_local_pos,
            ends=input_batch.cu_num_logits,
            ends_np=input_batch.cu_num_logits_np,
            # Known to the host from the schedule.
            seq_lens_np=input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens,
            invalid=invalid,
        )

    def chunks(self, max_rows: int) -> Iterator[SampleRows]:
        """The same requests in as few parts of at most ``max_rows`` rows as order allows.

        A request is never split: one with more rows is a part of its own.
        """
        requests = len(self.ends_np) - 1
        if self.logits.shape[0] <= max_rows:
            yield self
            return
        start = 0
        while start < requests:
            fits = np.searchsorted(self.ends_np, self.ends_np[start] + max_rows, side="right") - 1
            end = max(int(fits), start + 1)
            yield self._part(start, end)
            start = end

    def _part(self, start: int, end: int) -> SampleRows:
        first, last = int(self.ends_np[start]), int(self.ends_np[end])
        requests, rows = slice(start, end), slice(first, last)
        return SampleRows(
            logits=self.logits[rows],
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            slots=self.slots[requests],
            slots_np=self.slots_np[requests],
            row_slots=self.row_slots[rows],
            row_nodes=self.row_nodes[rows],
            ends=self.ends[start : end + 1] - first,
            ends_np=self.ends_np[start : end + 1] - first,
            seq_lens_np=self.seq_lens_np[requests],
            invalid=None if self.invalid is None else self.invalid[rows],
        )
