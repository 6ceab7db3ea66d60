# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker. Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_redrafter.engine.v2.worker import TreeWorkerMixin


class ReDrafterGPUWorker(TreeWorkerMixin, Worker):
    """Chosen by ``vllm_redrafter.engine.engine_args``."""
