# SPDX-License-Identifier: Apache-2.0
"""Custom logits processors on Model Runner V2: which requests they change.

vLLM gives them a request's rows as those of a chain, so a request that one changes gets a chain;
the others keep their trees. vLLM's own processors are not looked at here (see ``fallback``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

REASON = "custom logits processors (chain)"

_VLLMS_OWN = (BadWordsState, LogitBiasState, PenaltiesState)


class WatchedProcessor(LogitsProcessor):
    """A custom processor; tells of every request that it says it may change.

    Args:
        inner: the processor.
        changes: called with the request's slot.
    """

    def __init__(self, inner: Any, changes: Callable[[int], None]) -> None:
        self.inner, self._changes = inner, changes

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        does = self.inner.add_request(req_idx, sampling_params)
        if does:
            self._changes(req_idx)
        return does

    def apply_staged_writes(self) -> None:
        self.inner.apply_staged_writes()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        return self.inner.apply(logits, ctx)


def watch_custom(sampler: Any, changes: Callable[[int], None]) -> None:
    """Watch all custom processors of a ``Sampler``, those of installed plugins too."""
    sampler.logits_processors = [
        each if type(each) in _VLLMS_OWN else WatchedProcessor(each, changes)
        for each in sampler.logits_processors
    ]
