# SPDX-License-Identifier: Apache-2.0
"""Two of vLLM's checks that hold for other drafts and not for ours.

Requests with ``min_p`` or ``logit_bias`` are refused beside every speculative method, because
vLLM's rejection sampler for chains cannot take them. Ours draws every token with vLLM's own
sampler, which can.

A target with more tokens than its draft model is refused, for a draft model embeds every token with
its own table. Ours uses the target's; what it may lack is checked in ``checks``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_redrafter.drafter.config import MODEL_TYPES, model_type_of
from vllm_redrafter.engine.engine_args import PROPOSER_PATH

_WRAPPED_MARK = "_vllm_redrafter_wrapped"


def leave_out() -> None:
    """Leave both out where the drafts are ours, in this process, whatever else it runs."""
    from vllm.config import SpeculativeConfig
    from vllm.sampling_params import SamplingParams

    _unless(SamplingParams, "_validate_spec_decode", lambda _, config: is_ours(config))
    _unless(SpeculativeConfig, "verify_equal_vocab_size_if_draft_model", is_ours)


def _unless(owner: type, name: str, ours: Callable[..., bool]) -> None:
    original = getattr(owner, name)
    if getattr(original, _WRAPPED_MARK, False):
        return

    @functools.wraps(original)
    def check(*args: Any) -> Any:
        return None if ours(*args) else original(*args)

    setattr(check, _WRAPPED_MARK, True)
    setattr(owner, name, check)


def is_ours(speculative_config: Any) -> bool:
    """Whether a ``SpeculativeConfig`` of vLLM's, or None, is one that ``rewrite`` made."""
    if speculative_config is None:
        return False
    model = speculative_config.model
    if speculative_config.method == "custom_class":
        return model == PROPOSER_PATH
    return speculative_config.method == "draft_model" and _is_drafter(str(model))


@functools.cache
def _is_drafter(directory: str) -> bool:
    return model_type_of(directory) in MODEL_TYPES
