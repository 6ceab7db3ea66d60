# SPDX-License-Identifier: Apache-2.0
"""Every private vLLM symbol that we touch, in one table.

``vllm-redrafter doctor``, the contract test and the start-up check all read this table: a vLLM
release that moved something is refused with the name of what moved, before any request runs.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, replace

# Versions with which an engine was run, not only read, and for which model runners. 0.33.0 has no
# CPU build yet: its Python sources ran the V2 engine's tests with the compiled parts of 0.32.0.
# 0.25.1 is left out: eight hooks of the V2 engine do not fit it (init_speculator, propose and
# Sampler.sample have other parameters, five names are not there), and its Model Runner V2 does not
# take method draft_model, our carrier.
TESTED_VLLM = {"0.32.0": ("v1", "v2"), "0.33.0": ("v2",)}

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"


@dataclass(frozen=True)
class Hook:
    """One private symbol.

    Attributes:
        where: ``module:qualname``.
        why: what we do with it.
        parameters: names that its signature must have (we pass or receive them by name or order).
        fields: names that a class must declare (dataclass, NamedTuple or enum).
        attributes: names that its instances must have. Read from the source by doctor and by the
            contract tests; the check at start-up does not look at them.
        runner: "v1" or "v2" if only the engine for that model runner needs it, "" for both.
    """

    where: str
    why: str
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    runner: str = ""


# Of every attention implementation whose layers we take over.
_ATTENTION_ATTRIBUTES = (
    "num_heads",
    "head_size",
    "scale",
    "logits_soft_cap",
    "sliding_window",
    "alibi_slopes",
    "sinks",
)

_SHARED = (
    Hook(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "wrapped: rewrites method 'redrafter' into fields that vLLM accepts",
        parameters=("usage_context", "headless"),
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "wrapped: `--spec-method redrafter`",
        parameters=("parser",),
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
            "ec_transfer_config",
            "compilation_config",
            "enforce_eager",
            "enable_lora",
            "cudagraph_capture_sizes",
            "max_cudagraph_capture_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "enable_expert_parallel",
            "enable_batch_sharded_sampling",
            "async_scheduling",
            "kv_cache_dtype",
            "kv_offloading_size",
            "kv_sharing_fast_prefill",
            "aux_output_config",
            "model",
            "hf_config_path",
            "revision",
            "tensor_parallel_size",
            "data_parallel_size",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
        "finds the target's input embedding table",
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
        "finds the target's output head",
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices",
        "which rows of a table a rank holds",
        fields=("org_vocab_start_index", "org_vocab_end_index"),
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:"
        "VocabParallelEmbeddingShardIndices.num_org_elements_padded",
        "a rank's rows with their padding",
    ),
    Hook("vllm.distributed.parallel_state:get_tp_group", "the ranks that share a target"),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.embedding",
        "how rows of a quantized embedding are asked for",
        parameters=("layer", "input_"),
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply",
        "how rows of a quantized output head are asked for",
        parameters=("layer", "x", "bias"),
    ),
    Hook(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "wrapped: min_p and logit_bias beside our drafts are no error",
        parameters=("speculative_config",),
    ),
    Hook(
        "vllm.config:SpeculativeConfig.verify_equal_vocab_size_if_draft_model",
        "wrapped: a target with more tokens than our drafter is none either",
    ),
    Hook(
        "vllm.config:SpeculativeConfig",
        "whether the drafts are ours",
        fields=("method", "model"),
    ),
    Hook(
        "vllm.distributed.parallel_state:GroupCoordinator.all_gather",
        "the whole embedding on every rank",
        parameters=("input_", "dim"),
    ),
    Hook(
        "vllm.distributed.parallel_state:GroupCoordinator.all_reduce",
        "rows of a head that is shared with the target",
        parameters=("input_",),
    ),
    Hook(
        "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object",
        "the first rank's trees on Model Runner V1",
        parameters=("obj",),
    ),
    Hook(
        "vllm.distributed.parallel_state:GroupCoordinator.broadcast",
        "the first rank's trees on Model Runner V2",
        parameters=("input_",),
    ),
    Hook(
        "vllm.tokenizers:cached_tokenizer_from_config",
        "the target's tokenizer, compared with that of the drafter's training",
        parameters=("model_config",),
    ),
    Hook("vllm.platforms:current_platform.is_cpu", "refuses other platforms"),
    Hook(
        "vllm.config:VllmConfig",
        "what the checks and both engines read",
        fields=(
            "model_config",
            "cache_config",
            "parallel_config",
            "scheduler_config",
            "device_config",
            "compilation_config",
            "speculative_config",
            "kv_transfer_config",
            "lora_config",
            "additional_config",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.config:ParallelConfig",
        "what the checks read",
        attributes=(
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "use_ubatching",
        ),
    ),
    Hook(
        "vllm.config:CompilationConfig",
        "the target's layers by name, and which graphs there will be, where it is left to us",
        attributes=(
            "static_forward_context",
            "cudagraph_mode",
            "cudagraph_capture_sizes",
            "max_cudagraph_capture_size",
        ),
    ),
    Hook(
        "vllm.config:ModelConfig",
        "what the checks read",
        attributes=(
            "architectures",
            "runner_type",
            "use_mla",
            "is_hybrid",
            "is_attention_free",
            "is_moe",
            "is_encoder_decoder",
            "uses_mrope",
            "hf_text_config",
            "get_vocab_size",
            "get_head_size",
            "dtype",
            "get_hidden_size",
            "max_model_len",
            "attention_chunk_size",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.model_executor.layers.attention:Attention",
        "the layers whose `impl` is given our class, in our engine alone",
        attributes=("impl", "kv_cache"),
    ),
    Hook("vllm.platforms:current_platform.is_cuda", "chooses the worker"),
    Hook(
        "vllm.platforms:current_platform.get_device_name",
        "which nodes by batch size are computed for",
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "wrapped: our stat logger stands before vLLM's, in engines with ReDrafter",
        parameters=("vllm_config",),
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager",
        "see its constructor",
        attributes=("stat_loggers", "engine_indexes"),
    ),
    Hook(
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
        "the base class of our stat logger",
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerBase.record",
        "overridden: takes our counters out of a step's statistics",
        parameters=("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerBase.log_engine_initialized",
        "overridden: nothing to say",
    ),
    Hook(
        "vllm.v1.metrics.stats:SchedulerStats",
        "what our counters travel in, from the scheduler to the front end",
        fields=("ec_connector_stats",),
    ),
    Hook(
        "vllm.distributed.ec_transfer.ec_connector.metrics:ECConnectorStats",
        "what our counters travel in; the scheduler reads its data",
        fields=("data",),
    ),
    Hook(
        "vllm.v1.outputs:ECConnectorOutput",
        "what our counters travel in, from the worker to the scheduler",
        fields=("ec_connector_stats",),
    ),
    Hook(
        "vllm.v1.outputs:ModelRunnerOutput.with_ec_conn_output",
        "puts our counters on a step's output",
        parameters=("output", "ec_connector_output"),
    ),
    Hook(
        "vllm.v1.outputs:AsyncModelRunnerOutput.get_output",
        "overridden: puts our counters on an output that was still being computed",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
        "extended: sends our counters",
        parameters=("scheduler_output",),
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        "extended: sends our counters",
        parameters=("grammar_output",),
    ),
    Hook("vllm.envs:VLLM_USE_RUST_FRONTEND", "whether the front end could show our counters"),
)

_V1 = (
    Hook(
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        "builds our proposer from its class path",
        parameters=("vllm_config",),
    ),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "overridden: names our runner"),
    Hook(
        "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
        "extended: measures costs, for the node budget, when all is loaded",
    ),
    Hook(
        f"{RUNNER}._dummy_run",
        "passes of the target without requests, to be timed",
        parameters=("num_tokens",),
    ),
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
        f"{RUNNER}._bookkeeping_sync",
        "extended: seeded requests whose prompt goes on get their generators back",
        parameters=("scheduler_output", "sampler_output", "logits"),
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
        f"{RUNNER}.sample_tokens",
        "replaced where `vllm-redrafter data --hidden-states` answers: keeps what is sampled from",
        parameters=("grammar_output",),
    ),
    Hook(
        RUNNER,
        "see sample_tokens; what costs are measured on",
        attributes=(
            "requests",
            "input_batch",
            "max_num_tokens",
            "max_num_reqs",
            "drafter",
            "discard_request_mask",
        ),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
        "see sample_tokens",
        fields=("scheduler_output", "sample_hidden_states"),
    ),
    Hook(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "see sample_tokens",
        fields=("num_computed_tokens",),
    ),
    Hook(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "per-request rows",
        attributes=(
            "req_ids",
            "req_output_token_ids",
            "block_table",
            "num_computed_tokens_cpu",
            "num_tokens_no_spec",
            "thinking_budget_state_holder",
            "token_ids_cpu_tensor",
            "num_reqs",
            "generators",
            "logitsprocs",
            "req_id_to_index",
        ),
    ),
    Hook(
        "vllm.v1.worker.block_table:BlockTable",
        "the step's slots, from which moves are computed",
        attributes=("slot_mapping",),
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
            "spec_token_ids",
            "thinking_budget_state_holder",
        ),
    ),  # fmt: skip
    Hook("vllm.v1.sample.sampler:Sampler.greedy_sample", "argmax; ours has its rule for ties"),
    Hook(
        "vllm.v1.core.sched.utils:check_sequence_repetition",
        "ends a walk where the scheduler ends the request",
        parameters=("token_ids", "params"),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        "module global replaced while our runner is built: the processors of plain vLLM",
        parameters=("vllm_config", "custom_logitsprocs"),
    ),
    Hook(
        "vllm.v1.sample.logits_processor:BUILTIN_LOGITS_PROCESSORS",
        "which ones are exact at every node",
    ),
    Hook(
        "vllm.v1.sample.logits_processor:LogitsProcessors",
        "those without custom ones",
        attributes=("argmax_invariant", "non_argmax_invariant", "all"),
    ),
    Hook(
        "vllm.v1.sample.logits_processor:LogitBiasLogitsProcessor",
        "whether the plain argmax will do",
        attributes=("biases",),
    ),
    Hook(
        "vllm.v1.sample.logits_processor:AdapterLogitsProcessor",
        "which requests a custom processor is for",
        attributes=("req_info", "apply"),
    ),
    Hook(
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder",
        "told that there is one row of logits per request",
        attributes=("in_spec_mode",),
    ),
    Hook(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        "what tree attention computes with, and what it refuses",
        attributes=_ATTENTION_ATTRIBUTES,
    ),
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
        "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask",
        "wrapped: a row of a tree is masked by the grammar behind the node's own path",
        parameters=("requests", "structured_output_request_ids", "scheduled_spec_decode_tokens"),
    ),
    Hook(
        "vllm.v1.structured_output:StructuredOutputManager.validate_tokens",
        "wrapped: a tree that the grammar was asked about is no chain to be cut",
        parameters=("request", "spec_tokens"),
    ),
    Hook(
        "vllm.v1.structured_output:StructuredOutputManager._get_constraint_bounds",
        "whether a grammar is in force, or a reasoning section before it",
        parameters=("request", "spec_tokens"),
    ),
    Hook(
        "vllm.v1.structured_output:ConstraintBounds",
        "whether a grammar is in force",
        fields=("constraint_start",),
    ),
    Hook(
        "vllm.v1.structured_output.request:StructuredOutputRequest.grammar",
        "the grammar of a request, as the scheduler holds it",
    ),
    Hook(
        "vllm.v1.structured_output.backend_xgrammar:XgrammarGrammar",
        "copied and asked while a draft is made and before it is verified",
        fields=("matcher", "vocab_size", "ctx"),
    ),
)

_V2 = (
    Hook("vllm.triton_utils:HAS_TRITON", "whether vLLM would choose Model Runner V2"),
    Hook("vllm.config:CUDAGraphMode.FULL", "steps whose attention a graph replays"),
    Hook("vllm.config:CUDAGraphMode.FULL_DECODE_ONLY", "our own graphs' mode"),
    Hook("vllm.config:CUDAGraphMode.decode_mode", "whether decode steps have full graphs"),
    Hook(
        "vllm.v1.attention.backend:AttentionCGSupport.UNIFORM_BATCH",
        "the steps that a full graph may hold",
    ),
    Hook("vllm.config:VllmConfig.use_v2_model_runner", "which one it did choose"),
    Hook(
        "vllm.config:CUDAGraphMode.PIECEWISE",
        "the graphs that are left where the operators have no CUDA kernels",
    ),
    Hook(
        "vllm.model_executor.models.registry:ModelRegistry.register_model",
        "makes the carrier's architecture known",
        parameters=("model_arch", "model_cls"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_runner:init_speculator",
        "module global replaced during init_device",
        parameters=("vllm_config", "device", "req_states"),
    ),
    Hook(
        V2_RUNNER,
        "the counters hang on its model state; our LoRA state takes the place of its own",
        attributes=("model_state", "lora_config", "lora_state", "max_num_reqs"),
    ),
    Hook(
        "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs",
        "extended: an adapter per row of logits",
        parameters=("req_ids", "idx_mapping", "num_scheduled_tokens"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.preprocess_state",
        "extended: rows of logits, before adapters are told of the step",
        parameters=("input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"),
    ),
    Hook("vllm.v1.worker.gpu.sample.bad_words:BadWordsState", "one of vLLM's own processors"),
    Hook("vllm.v1.worker.gpu.sample.logit_bias:LogitBiasState", "one of vLLM's own processors"),
    Hook("vllm.v1.worker.gpu.sample.penalties:PenaltiesState", "one of vLLM's own processors"),
    Hook(
        "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor",
        "the interface of what watches custom processors",
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.add_request",
        "overridden: which requests a custom processor changes",
        parameters=("req_idx", "sampling_params"),
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply_staged_writes",
        "overridden: handed on",
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply",
        "overridden: handed on",
        parameters=("logits", "ctx"),
    ),
    Hook(
        f"{V2_RUNNER}.sample",
        "calls the model state's rejection sampler with logits, batch, draft logits, invalid ones",
        parameters=("hidden_states", "input_batch", "grammar_output"),
    ),
    Hook(f"{V2_RUNNER}.postprocess_sampled", "calls postprocess_state", ("num_sampled",)),
    Hook("vllm.v1.worker.gpu_worker:Worker.init_device", "extended: names our speculator"),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
        "extended: forgets what the warm-up counted",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.sleep",
        "extended: refuses to lose the drafter",
        parameters=("level",),
    ),
    Hook(
        "vllm.v1.worker.gpu.warmup:warmup_kernels",
        "asks the rejection sampler, which is ours, what a RejectionSampler has",
        parameters=("model_runner", "worker_execute_model", "worker_sample_tokens"),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler",
        "what the tree sampler stands in for",
        attributes=("enable_adaptive_verification",),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator",
        "the base class of our speculator",
        parameters=("vllm_config", "device"),
        attributes=("vllm_config", "device", "max_num_reqs", "max_num_tokens"),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_draft_model",
        "overridden: loads the drafter",
        parameters=("target_model", "target_attn_layer_names"),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_model",
        "overridden: hands the runner our model state",
        parameters=("target_model",),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.set_attn",
        "overridden: a drafter has no attention",
        parameters=("model_state", "kv_cache_config", "block_tables"),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager",
        "overridden: graphs of our own",
        parameters=("cudagraph_mode",),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture",
        "overridden: graphs of our own",
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose",
        "overridden: the draft",
        parameters=(
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
            "dp_sync_state",
            "dummy_run",
            "skip_attn_for_dummy_run",
            "mm_inputs",
            "is_profile",
            "num_speculative_tokens",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        "asks the target for get_model_state_cls",
        parameters=("vllm_config", "model"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "the base class of our model state",
        parameters=("vllm_config", "model", "encoder_cache", "device"),
        attributes=("vllm_config", "model_config", "max_num_reqs", "max_num_tokens", "device"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request",
        "extended: what may be drafted for a request",
        parameters=("req_index", "new_req_data"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
        "extended: attaches the trees of the step to the attention metadata",
        parameters=(
            "input_batch",
            "cudagraph_mode",
            "block_tables",
            "slot_mappings",
            "attn_groups",
            "kv_cache_config",
            "for_capture",
            "ubatch_idx",
            "model_specific_attn_metadata",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs",
        "extended: positions by depth",
        parameters=("input_batch", "req_states"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_dummy_inputs",
        "extended: the buffer of positions",
        parameters=("num_reqs", "num_tokens"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState",
        "the second base class where the target has recurrent layers",
        attributes=("num_accepted_tokens_gpu",),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState.postprocess_state",
        "called behind ours: which state a request goes on from",
        parameters=("idx_mapping", "num_sampled", "num_computed_tokens"),
    ),
    Hook(
        "vllm.v1.kv_cache_interface:MambaSpec",
        "which kind of recurrent layers a KV cache group has",
        fields=("mamba_type",),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.custom_sampler",
        "overridden: the tree sampler",
        parameters=("sampler",),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.get_additional_cg_support",
        "overridden: a full graph holds steps of trees of one size",
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.capture",
        "captures with what prepare_attn returned for dummy requests of the same size",
        parameters=("model", "model_state", "input_buffers", "block_tables", "attn_groups"),
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager",
        "the base class of what captures drafts, and what follows the sampler",
        parameters=("vllm_config", "device", "cudagraph_mode", "decode_query_len"),
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture",
        "called: calls a function that makes the function to capture, for each size",
        parameters=("create_forward_fn", "progress_bar_desc"),
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_fullgraph",
        "called: replays one",
        parameters=("desc",),
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory",
        "lets go of graphs, after measuring, that are attributes of the speculator",
        parameters=("runner",),
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
        "which graph was found",
        fields=("cg_mode", "num_reqs"),
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch",
        "full graphs only where every request has the rows of the capture",
        parameters=("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.initialize_kv_cache",
        "extended: our attention, and what moves KV",
        parameters=("kv_cache_config", "block_tables"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.postprocess_state",
        "overridden: moves the accepted path's KV",
        parameters=("idx_mapping", "num_sampled", "num_computed_tokens"),
    ),
    Hook(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "the rows of a step",
        fields=(
            "num_reqs",
            "num_reqs_after_padding",
            "idx_mapping",
            "idx_mapping_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "num_scheduled_tokens",
            "num_tokens_after_padding",
            "num_draft_tokens",
            "num_draft_tokens_per_req",
            "query_start_loc",
            "query_start_loc_np",
            "seq_lens",
            "num_computed_tokens_np",
            "input_ids",
            "positions",
            "logits_indices",
            "cu_num_logits",
            "cu_num_logits_np",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.worker.gpu.input_batch:get_num_sampled_and_rejected",
        "emitted tokens and rejected rows, 0 for a prefill that goes on",
        parameters=("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.sampler:Sampler",
        "how logprobs are taken, and how long prompts are",
        attributes=(
            "req_states",
            "logprobs_mode",
            "compute_nans",
            "logprob_token_ids_state",
            "logits_processors",
        ),
    ),
    Hook(
        "vllm.v1.worker.gpu.states:RequestState",
        "see Sampler; and the texts that the lookup searches",
        attributes=("prefill_len", "all_token_ids", "total_len"),
    ),
    Hook(
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        "which layers share block tables",
        fields=("kv_cache_groups",),
    ),
    Hook(
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
        "which layers share block tables",
        fields=("layer_names",),
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.sampler:Sampler.sample",
        "draws the target's token at every row",
        parameters=(
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "return_logprobs",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.worker.gpu.sample.sampler:Sampler.get_logprobs_dims",
        "how many logprobs are asked for",
        parameters=("idx_mapping_np",),
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.logprob:compute_topk_scores",
        "logprobs of the path",
        parameters=(
            "logits",
            "num_logprobs",
            "sampled_token_ids",
            "cu_num_logits",
            "logprob_token_ids_state",
            "expanded_idx_mapping",
            "max_per_req_token_ids",
            "logits_mode",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.outputs:LogprobsTensors.cat",
        "logprobs of a step that is sampled in parts",
        parameters=("tensors", "cu_num_generated_tokens"),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:get_max_chunk_logits",
        "how many logits rows vLLM samples at once",
        parameters=("vocab_size",),
    ),
    Hook("vllm.config.model:PROCESSED_LOGPROBS_MODES", "which logits logprobs are taken from"),
    Hook("vllm.v1.worker.gpu.metrics.logits:get_num_nans", "as vLLM's samplers", ("logits",)),
    Hook(
        "vllm.v1.worker.gpu.sample.output:SamplerOutput",
        "what the tree sampler returns",
        fields=(
            "sampled_token_ids",
            "logprobs_tensors",
            "num_nans",
            "num_sampled",
            "num_rejected",
        ),
    ),  # fmt: skip
    Hook(
        "vllm.v1.core.sched.output:NewRequestData",
        "what a request may have drafted",
        fields=("sampling_params", "lora_request", "prompt_embeds"),
    ),
    Hook(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
        "what tree attention computes with, and what it refuses",
        attributes=_ATTENTION_ATTRIBUTES,
    ),
    Hook(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata",
        "block table of the step",
        fields=("block_table",),
    ),
    Hook(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
        "overridden on CUDA: tree rows go through our op",
        parameters=("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
)

HOOKS: tuple[Hook, ...] = (
    *_SHARED,
    *(replace(hook, runner="v1") for hook in _V1),
    *(replace(hook, runner="v2") for hook in _V2),
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
    # Another plugin's wrapper may hide the names; it hands on what it was given, as ours does.
    owner = str(getattr(found, "__module__", "vllm")).partition(".")[0]
    foreign = owner not in ("vllm", "vllm_redrafter")
    if hook.parameters and not foreign:
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


def check_hooks(runner: str = "") -> list[tuple[Hook, str | None]]:
    """Every hook with its problem, None where it is as we expect it.

    Args:
        runner: leave out what only the engine for the other model runner needs; "" for all.
    """
    wanted = [hook for hook in HOOKS if not (runner and hook.runner) or hook.runner == runner]
    return [(hook, check_hook(hook)) for hook in wanted]


def vllm_version() -> str:
    """Version of the vLLM that is imported, without a local part such as ``+cpu``.

    Not from metadata: those may belong to another copy, for instance where an unpacked wheel stands
    on PYTHONPATH before an installed one.
    """
    import vllm

    return str(vllm.__version__).split("+")[0]


def tested_versions(runner: str = "") -> tuple[str, ...]:
    """Versions of vLLM that the engine for a model runner ("v1", "v2", "" for any) was run with."""
    return tuple(
        version for version, runners in TESTED_VLLM.items() if not runner or runner in runners
    )
