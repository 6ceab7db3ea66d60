# SPDX-License-Identifier: Apache-2.0
"""Workers that start as on a GPU: vLLM measures, warms up and captures before the first request.

vLLM's CPU worker leaves that out; here it does what vLLM's GPU worker does. Graphs are those of
``emulated_graphs``. What vLLM's kernels need for themselves is left out: memory is not measured,
and only what the runner is made to do remains of ``kernel_warmup``, which imports models that need
further packages.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.warmup.attention_warmup import mixed_batch_attention_warmup
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker import gpu_worker, workspace
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from engine_v2.own_process.emulated_graphs import patch_torch


def start_as_on_a_gpu(monkeypatch, sizes):
    """Until the patches are undone, workers start like vLLM's for GPUs.

    Args:
        sizes: query rows that get graphs.
    """
    patch_torch(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (1 << 30, 1 << 30))
    monkeypatch.setattr(CpuPlatform, "graph_pool_handle", lambda self: object(), raising=False)
    support = AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", support)
    monkeypatch.setattr(workspace, "_manager", None)
    workspace.init_workspace_manager(torch.device("cpu"))
    monkeypatch.setattr(gpu_worker, "kernel_warmup", kernel_warmup)

    def determine_available_memory(worker):
        config = worker.vllm_config
        compilation = config.compilation_config
        # What vLLM's CPU platform and ``enforce_eager`` took out of the configuration.
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = sorted(sizes)
        compilation.max_cudagraph_capture_size = max(sizes)
        config.model_config.enforce_eager = False
        config.kernel_config.enable_jit_warmup = True
        for layer in compilation.static_forward_context.values():
            layer.use_direct_call = True
        worker.init_snapshot = SimpleNamespace(free_memory=0)
        available = Worker.determine_available_memory(worker)
        # Where the size of the cache is given, as here, vLLM leaves this out.
        worker.model_runner.profile_cudagraph_memory()
        return available

    monkeypatch.setattr(CPUWorker, "determine_available_memory", determine_available_memory)
    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", Worker.compile_or_warm_up_model)


def kernel_warmup(worker):
    """What vLLM's has the runner of a dense target do."""
    worker.model_runner.jit_warmup_registry.warmup()
    # As FlashInfer's autotuning.
    rows = worker.scheduler_config.max_num_batched_tokens
    worker.model_runner._dummy_run(num_tokens=rows, skip_eplb=True, is_profile=True)
    # As where FlashInfer computes attention.
    mixed_batch_attention_warmup(worker)
