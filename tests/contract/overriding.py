# SPDX-License-Identifier: Apache-2.0
"""What our engines override and read of vLLM's classes, from our source."""

import ast
import inspect


def overrides() -> list[tuple[type, type, str]]:
    """(our class, vLLM's class, method) for each method that replaces one of vLLM's."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase
    from vllm.v1.outputs import AsyncModelRunnerOutput
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_redrafter.engine.cpu_attention import TreeCPUAttentionImpl
    from vllm_redrafter.engine.prometheus.logger import ReDrafterStatLogger
    from vllm_redrafter.engine.prometheus.sender import _Carrying
    from vllm_redrafter.engine.prometheus.worker import MetricsWorkerMixin
    from vllm_redrafter.engine.v1.runner import TreeRunnerMixin
    from vllm_redrafter.engine.v1.worker import ReDrafterCPUModelRunner, ReDrafterCPUWorker
    from vllm_redrafter.engine.v2 import cuda_attention, model_state, speculator, worker
    from vllm_redrafter.engine.v2.logits_processors import WatchedProcessor
    from vllm_redrafter.engine.v2.lora import TreeLoraState

    pairs = [
        (TreeRunnerMixin, CPUModelRunner),
        (ReDrafterCPUModelRunner, CPUModelRunner),
        (ReDrafterCPUWorker, CPUWorker),
        (TreeCPUAttentionImpl, CPUAttentionBackendImpl),
        (worker.TreeWorkerMixin, CPUWorker),
        (worker.TreeWorkerMixin, Worker),
        (speculator.ReDrafterSpeculator, DraftModelSpeculator),
        (model_state.TreeModelState, DefaultModelState),
        (cuda_attention.TreeFlashAttentionImpl, FlashAttentionImpl),
        (TreeLoraState, LoraState),
        (WatchedProcessor, LogitsProcessor),
        (MetricsWorkerMixin, CPUWorker),
        (MetricsWorkerMixin, Worker),
        (ReDrafterStatLogger, AggregateStatLoggerBase),
        (_Carrying, AsyncModelRunnerOutput),
    ]
    return [
        (ours, theirs, name)
        for ours, theirs in pairs
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and hasattr(theirs, name) and not name.startswith("__")
    ]


def attributes_read(function_source: str, prefix: str) -> set[str]:
    """Names X in ``<prefix>.X``, for instance with prefix ``self.input_batch``."""
    return {
        node.attr
        for node in ast.walk(ast.parse(function_source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == prefix
    }
