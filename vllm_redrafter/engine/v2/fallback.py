# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot have a tree get a chain or no draft, in the same padded rows.

vLLM's processors on the device count the tokens before a row by the rows before it in its request,
which is right for a chain and wrong for a branch. And where a request ends inside a tree is only
found if a token alone can say so.
"""

from __future__ import annotations

from typing import Any

from vllm_redrafter.engine.v2.endings import MOST_STOP_TOKENS
from vllm_redrafter.engine.v2.tree_store import Shape


def shape_of_request(new_req_data: Any) -> tuple[Shape, str]:
    """What may be drafted for a new request, and why if it is no tree.

    What custom logits processors demand is known later, see ``logits_processors``.

    Args:
        new_req_data: vLLM's ``NewRequestData``.
    """
    params = new_req_data.sampling_params
    if params is None:
        return Shape.NOTHING, ""
    if getattr(params, "thinking_token_budget", None) is not None:
        return Shape.NOTHING, "a thinking token budget (no draft)"
    if params.repetition_detection is not None:
        return Shape.NOTHING, "repetition detection (no draft)"
    if len(stop_tokens(params)) > MOST_STOP_TOKENS:
        return Shape.NOTHING, f"more than {MOST_STOP_TOKENS} stop tokens (no draft)"
    if params.structured_outputs is not None:
        return Shape.CHAIN, "structured output (chain)"
    if (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    ):
        return Shape.CHAIN, "penalties (chain)"
    if params.bad_words:
        return Shape.CHAIN, "bad words (chain)"
    return Shape.TREE, ""


def stop_tokens(params: Any) -> set[int]:
    """The tokens that end a request, as vLLM's scheduler sees it (``check_stop``)."""
    own = set(params.stop_token_ids or ())
    return own if params.eos_token_id is None else own | {params.eos_token_id}
