# SPDX-License-Identifier: Apache-2.0
"""The operators: one module each, with a compiled form and a PyTorch twin in ``reference``."""

from vllm_redrafter.ops.library import (
    ISAS,
    compiled_available,
    cuda_architectures,
    has_kernel,
    isa,
    set_isa,
    why_not,
)

__all__ = [
    "ISAS",
    "compiled_available",
    "cuda_architectures",
    "has_kernel",
    "isa",
    "set_isa",
    "why_not",
]
