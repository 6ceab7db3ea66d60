# SPDX-License-Identifier: Apache-2.0
"""Environment of engines with tiny models; to be set before torch and vLLM are imported."""

from __future__ import annotations

import os

DEFAULTS = {
    # Small models gain nothing from threads, and spinning ones slow each other down.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def set_defaults() -> None:
    """Where the caller's environment says nothing else."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
