# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot have a tree get a chain or no draft, in the same padded rows.

vLLM's processors on the device count the tokens before a row by the rows before it in its request,
which is right for a chain and wrong for a branch.
"""

from __future__ import annotations

from typing import Any

from vllm_redrafter.engine.v2.tree_store import Shape


def shape_of_request(new_req_data: Any, model_config: Any) -> tuple[Shape, str]:
    """What may be drafted for a new request, and why if it is no tree.

    Args:
        new_req_data: vLLM's ``NewRequestData``.
        model_config: vLLM's ``ModelConfig``.
    """
    params = new_req_data.sampling_params
    if new_req_data.lora_request is not None:
        return Shape.NOTHING, "LoRA (no draft)"
    if new_req_data.prompt_embeds is not None:
        return Shape.NOTHING, "prompt embeddings (no draft)"
    if params is None:
        return Shape.NOTHING, ""
    if getattr(params, "thinking_token_budget", None) is not None:
        return Shape.NOTHING, "a thinking token budget (no draft)"
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
    if model_config.logits_processors:
        return Shape.CHAIN, "logits processors of your own (chain)"
    return Shape.TREE, ""
