# SPDX-License-Identifier: Apache-2.0
"""One line in the server's log that says what runs."""

from __future__ import annotations

import logging
from typing import Any

import torch

from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.first_rank import is_first_rank
from vllm_redrafter.engine.target_shape import TargetShape, shape_of
from vllm_redrafter.ops.library import cuda_architectures, has_kernel, isa
from vllm_redrafter.options import ReDrafterOptions

logger = logging.getLogger("vllm.vllm_redrafter")


def say_what_runs(vllm_config: Any, runner: str, device: torch.device) -> None:
    """Log the line, once per engine: by its first tensor-parallel rank.

    Args:
        runner: "V1" or "V2".
        device: where the operators run.
    """
    if is_first_rank():
        options, target = options_of(vllm_config), vllm_config.model_config.model
        logger.info("%s", what_runs(options, target, runner, device, shape_of(vllm_config)))


def what_runs(
    options: ReDrafterOptions, target: str, runner: str, device: torch.device, shape: TargetShape
) -> str:
    """Drafter, target, shape, sizes, rule, lookup, budget, operators and runner, in one line."""
    lookup = f"{options.prompt_lookup_num_tokens} tokens" if options.prompt_lookup else "off"
    return (
        f"ReDrafter is on: drafter '{options.model}' for target '{target}', which gets {shape}, "
        f"W={options.beam_width}, L={options.draft_length}, N={_nodes(options)}, "
        f"rule {options.tree}, lookup {lookup}, budget {options.node_budget}, "
        f"operators {_operators(device)}, Model Runner {runner}."
    )


def _nodes(options: ReDrafterOptions) -> str:
    """The most nodes of a request; with a schedule, those of every range of batch sizes."""
    most = str(options.num_speculative_tokens)
    ranges = ", ".join(
        f"{options.nodes_for(first)} for {first} to {last} requests"
        for first, last, _ in options.num_speculative_tokens_per_batch_size
    )
    return f"{most} ({ranges})" if ranges else most


def _operators(device: torch.device) -> str:
    if not has_kernel(device):
        return "not compiled (slow; see `vllm-redrafter doctor`)"
    if device.type != "cuda":
        return isa()
    major, minor = torch.cuda.get_device_capability(device)
    return f"CUDA {major}.{minor} (built for {cuda_architectures()})"
