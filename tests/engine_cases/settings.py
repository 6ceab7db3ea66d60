# SPDX-License-Identifier: Apache-2.0
"""Every field of three of vLLM's configurations: it works, it is refused, or why it was not tried.

A release of vLLM with a new field fails tests/engine_errors/test_every_setting.py until the field
stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Works:
    """Tried in an engine with ReDrafter on, beside plain vLLM with the same value.

    Attributes:
        value: what it is tried with.
        engine: which of the engines of tests/engine_v1/test_settings.py has it.
        argument: its name among ``EngineArgs``, where that is another.
    """

    value: Any
    engine: str = "a"
    argument: str = ""


@dataclass(frozen=True)
class Refused:
    """At start-up, with our sentence.

    Attributes:
        message: a part of the sentence.
        arguments: of ``EngineArgs``.
    """

    message: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NotTried:
    """Attributes: why."""

    why: str


OF_THE_TARGET = NotTried("vLLM reads it off the target; targets that ReDrafter lacks are refused")
DERIVED = NotTried("vLLM computes it and takes none from a user")
MAMBA = NotTried("of recurrent layers, and targets with such are refused")
WINDOWS = NotTried("of sliding windows, and tried in engine_v1/test_windows.py")

SCHEDULER = {
    "max_model_len": Works(224),
    "is_encoder_decoder": OF_THE_TARGET,
    "runner_type": Refused("not for runner 'pooling'", {"runner": "pooling"}),
    "max_num_batched_tokens": Works(96),
    "max_num_scheduled_tokens": Works(80),
    "max_num_seqs": Works(6),
    "max_num_active_seqs": Works(5),
    "long_prefill_token_threshold": Works(20),
    "long_prefill_token_threshold_adaptive": Works(True),
    "max_num_queued_reqs": Works(1000),
    "max_num_queued_tokens": Works(100_000),
    "enable_chunked_prefill": Works(False, "b"),
    "is_multimodal_model": OF_THE_TARGET,
    "max_num_encoder_input_tokens": DERIVED,
    "encoder_cache_size": DERIVED,
    "policy": Works("priority", argument="scheduling_policy"),
    "disable_chunked_mm_input": Works(True),
    "scheduler_cls": Works("vllm.v1.core.sched.scheduler.Scheduler", "b"),
    "disable_hybrid_kv_cache_manager": Works(True),
    "scheduler_reserve_full_isl": Works(False),
    "watermark": Works(0.1),
    "prefill_schedule_interval": Works(2),
    "async_scheduling": Refused("async_scheduling on Model Runner V1", {"async_scheduling": True}),
    "stream_interval": Works(3),
}

CACHE = {
    "block_size": Works(64, "b"),
    "user_specified_block_size": DERIVED,
    "kv_cache_layout": DERIVED,
    # With one kind of layer vLLM takes the block size alone.
    "prefix_match_unit": Works(32),
    "gpu_memory_utilization": Works(0.5, "b"),
    "cache_dtype": Refused("kv_cache_dtype 'fp8'", {"kv_cache_dtype": "fp8"}),
    "is_attention_free": OF_THE_TARGET,
    "num_gpu_blocks_override": Works(48),
    "sliding_window": OF_THE_TARGET,
    "enable_prefix_caching": Works(False, "b"),
    "prefix_caching_hash_algo": Works("sha256_cbor"),
    "prefix_cache_retention_interval": WINDOWS,
    "kv_cache_dtype_skip_layers": NotTried("of packed KV caches, which are refused"),
    "mamba_page_size_padded": MAMBA,
    "skip_page_size_padded": DERIVED,
    "mamba_block_size": MAMBA,
    "mamba_cache_dtype": MAMBA,
    "mamba_ssm_cache_dtype": MAMBA,
    "mamba_cache_mode": MAMBA,
    "enable_mamba_shared_prefix_checkpoint": MAMBA,
    "replayssm_buffer_len": MAMBA,
    "use_replayssm": MAMBA,
    "use_kda_recoverssm": MAMBA,
    "num_gpu_blocks": DERIVED,
    "num_cpu_blocks": DERIVED,
    "effective_attention_block_size": DERIVED,
    "kv_cache_size_tokens": DERIVED,
    "kv_cache_max_concurrency": DERIVED,
    "hash_block_size": DERIVED,
    "cache_hit_alignment_tokens": DERIVED,
    "kv_sharing_fast_prefill": Refused(
        "does not support kv_sharing_fast_prefill", {"kv_sharing_fast_prefill": True}
    ),
    "swa_bounded_replay": NotTried("of DeepSeek V4, whose attention is refused"),
    "kv_cache_memory_bytes": NotTried("on a CPU vLLM puts VLLM_CPU_KVCACHE_SPACE there"),
    "kv_offloading_size": Refused("does not support KV offloading", {"kv_offloading_size": 1.0}),
    "kv_offloading_backend": NotTried("of KV offloading, which is refused"),
    "_block_size_resolved": DERIVED,
}


def _unknown(key: str, value: Any) -> Refused:
    return Refused(f"the unknown key '{key}'", {"options": {key: value}})


# Keys of speculative_config; the options of ReDrafter that vLLM does not know are not among them.
SPECULATIVE = {
    "method": Works("redrafter"),
    "model": Works("the drafter's directory"),
    "num_speculative_tokens": Works(9),
    "num_speculative_tokens_per_batch_size": Works([[1, 2, 9], [3, 8, 4]], "b"),
    "revision": Works("main"),
} | {
    key: _unknown(key, value)
    for key, value in {
        "enforce_eager": True,
        "draft_tensor_parallel_size": 1,
        "tensor_parallel_size": 1,
        "quantization": "fp8",
        "moe_backend": "auto",
        "attention_backend": "CPU_ATTN",
        "kv_cache_dtype": "auto",
        "max_model_len": 128,
        "code_revision": "main",
        "index_share_for_mtp_iteration": True,
        "disable_padded_drafter_batch": True,
        "disable_eagle_block_drop": True,
        "use_local_argmax_reduction": True,
        "use_heterogeneous_vocab": True,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
        "parallel_drafting": True,
        "target_model_config": None,
        "target_parallel_config": None,
        "draft_model_config": None,
        "draft_parallel_config": None,
        "suffix_decoding_max_tree_depth": 24,
        "suffix_decoding_max_cached_requests": 10,
        "suffix_decoding_max_spec_factor": 1.0,
        "suffix_decoding_min_token_prob": 0.1,
        "draft_load_config": None,
        "rejection_sample_method": "standard",
        "synthetic_acceptance_rates": [0.5],
        "synthetic_acceptance_length": 1.5,
        "enable_adaptive_verification": True,
        "draft_sample_method": "greedy",
        "dspark_draft_topk": 4,
    }.items()
}
