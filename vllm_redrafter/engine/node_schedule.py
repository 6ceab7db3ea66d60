# SPDX-License-Identifier: Apache-2.0
"""Nodes by batch size on Model Runner V2, where neither the user nor the drafter says any.

vLLM wants the table before it has read the target, so the target's size is computed from its
config.json. The file is the only thing that is read, and vLLM reads it anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_redrafter.budget.schedule import (
    MOST_REQUESTS,
    Device,
    Roofline,
    computed_schedule,
    device_named,
)
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.options import SCHEDULE, ReDrafterOptions

logger = logging.getLogger("vllm.vllm_redrafter")

# Keys of targets that read only some of their weights for a token: no number of rows is known
# then at which a step turns compute-bound.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

# The rest of the arithmetic is in what all decoder-only targets that we take have in common.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size")  # fmt: skip


def with_schedule(
    engine_args: Any, options: ReDrafterOptions, drafter: DrafterConfig
) -> ReDrafterOptions:
    """The options with a computed schedule, if one is wanted and can be had."""
    from vllm.platforms import current_platform

    # Replicas of a data-parallel engine must draft alike: vLLM would drop a schedule.
    wanted = options.node_budget == "auto" and not options.num_speculative_tokens_per_batch_size
    if not wanted or current_platform.is_cpu() or engine_args.data_parallel_size > 1:
        return options
    name = current_platform.get_device_name()
    device = device_named(name)
    target = target_cost(read_config(engine_args), device, engine_args.tensor_parallel_size)
    if target is None:
        logger.warning(
            "ReDrafter cannot tell the target's size from its config.json and verifies %d nodes "
            "at every batch size; set %s if many requests run at once.",
            options.num_speculative_tokens, SCHEDULE,
        )  # fmt: skip
        return options
    ranges = computed_schedule(
        target, drafter_cost(drafter, device), options.beam_width, options.draft_length,
        options.num_speculative_tokens, engine_args.max_num_seqs or MOST_REQUESTS,
    )  # fmt: skip
    logger.info(
        "ReDrafter's nodes by batch size, computed for %s and not measured: %s; %s sets others.",
        name, [list(entry) for entry in ranges], SCHEDULE,
    )  # fmt: skip
    return replace(options, num_speculative_tokens_per_batch_size=ranges)


def read_config(engine_args: Any) -> Mapping[str, Any]:
    """The target's config.json; empty if there is none to read, of which vLLM will speak."""
    from transformers import PretrainedConfig

    try:
        where = engine_args.hf_config_path or engine_args.model
        return PretrainedConfig.get_config_dict(where, revision=engine_args.revision)[0]
    except (OSError, ValueError):
        return {}


def target_cost(config: Mapping[str, Any], device: Device, ranks: int) -> Roofline | None:
    """One pass of the target on one of so many ranks; None where its size is not plain.

    Args:
        config: its config.json.
        device: of one rank.
        ranks: that share it.
    """
    text = config.get("text_config") or config
    if any(text.get(key) for key in EXPERTS) or not all(text.get(key) for key in SIZES):
        return None
    hidden, inner, layers, heads, vocab = (int(text[key]) for key in SIZES)
    head_dim = text.get("head_dim") or hidden // heads
    kv_heads = text.get("num_key_value_heads") or heads
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    # The embedding is looked up, the head is multiplied with.
    parameters = layers * (attention + 3 * hidden * inner) + vocab * hidden
    shared = parameters / ranks
    return Roofline(shared, shared * bits_of(config) / 8, device)


def bits_of(config: Mapping[str, Any]) -> int:
    """Bits of a weight: the fewest that it can be, so that no step is taken for memory-bound."""
    quantization = config.get("quantization_config")
    if not quantization:
        return 16
    bits = quantization.get("bits")
    if isinstance(bits, int):
        return bits
    return 8 if "fp8" in str(quantization.get("quant_method")) else 4


def drafter_cost(config: DrafterConfig, device: Device) -> Roofline:
    """One depth of the drafter, whole on every rank, in 16 bits."""
    hidden, exit_dim = config.hidden_size, config.exit_dim
    parameters = config.num_draft_layers * exit_dim**2 + config.draft_vocab_size * exit_dim
    if config.has_input_proj:
        parameters += 2 * hidden * exit_dim
    if config.rnn is not False:
        parameters += 2 * hidden**2
    return Roofline(parameters, 2 * parameters, device)
