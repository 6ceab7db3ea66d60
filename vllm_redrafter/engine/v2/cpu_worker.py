# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker, on which Model Runner V2 runs where Triton has a CPU backend."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_redrafter.engine.v2.worker import TreeWorkerMixin


class ReDrafterCPUWorker(TreeWorkerMixin, CPUWorker):
    """Chosen by ``vllm_redrafter.engine.engine_args``."""
