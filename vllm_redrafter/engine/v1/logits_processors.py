# SPDX-License-Identifier: Apache-2.0
"""vLLM's logits processors on Model Runner V1, all of them, beside trees.

A processor keeps its state by batch row, and a walk draws one token per batch row at a time: so
vLLM's own processors (``min_tokens``, ``logit_bias``, ``min_p``), which only look at a request's
parameters and its tokens so far, are exact at every node. A custom one may count its calls, so it
is called once a step, as without drafts: a request that it may change gets no draft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    AdapterLogitsProcessor,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
)
from vllm.v1.worker import gpu_model_runner

REASON = "custom logits processors (no draft)"


@contextmanager
def all_processors() -> Iterator[None]:
    """A runner that is built meanwhile gets the processors of an engine without speculation.

    Beside speculation vLLM builds ``min_tokens`` alone and refuses custom ones.
    """
    stock = gpu_model_runner.build_logitsprocs

    def build(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return stock(plain, *args, **kwargs)

    gpu_model_runner.build_logitsprocs = build  # type: ignore[assignment]
    try:
        yield
    finally:
        gpu_model_runner.build_logitsprocs = stock  # type: ignore[assignment]


def is_custom(processor: Any) -> bool:
    return type(processor) not in BUILTIN_LOGITS_PROCESSORS


def without_custom(processors: Any) -> Any:
    """A ``LogitsProcessors`` of vLLM's own; the same one if there are no others."""
    if not any(map(is_custom, processors.all)):
        return processors
    return LogitsProcessors(each for each in processors.all if not is_custom(each))


def custom_may_change(processors: Any, row: int) -> bool:
    """Whether a custom processor may change the logits of a batch row.

    One made of vLLM's ``AdapterLogitsProcessor`` says which rows it is for; another says nothing.
    """
    return any(
        row in processor.req_info if _says_which_rows(processor) else True
        for processor in processors.all
        if is_custom(processor)
    )


def _says_which_rows(processor: Any) -> bool:
    """Whether its rows are ``AdapterLogitsProcessor``'s own, all others untouched."""
    ours = AdapterLogitsProcessor
    return isinstance(processor, ours) and type(processor).apply is ours.apply


def may_change_argmax(processors: Any) -> bool:
    """Whether some request's likeliest token may be another one than before.

    ``min_tokens`` is not looked at.
    """
    return any(
        each.biases if isinstance(each, LogitBiasLogitsProcessor) else is_custom(each)
        for each in processors.non_argmax_invariant
    )
