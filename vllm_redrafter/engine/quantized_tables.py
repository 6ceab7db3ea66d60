# SPDX-License-Identifier: Apache-2.0
"""Rows of a target's quantized tables, by asking vLLM's own layers.

What lies in memory is up to the quantization and to the kernel that was chosen for the device; on
the CPU the weights may even be gone from the module. But a lookup gives an embedding's rows, and a
head multiplies the identity matrix as it multiplies hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.drafter.config import DrafterError

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows that are dequantized, or inputs that are multiplied, at once.
CHUNK = 1024


def is_plain(module: Any) -> bool:
    """Whether a vocabulary-parallel module's weight is its table, not quantized."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in PLAIN_DTYPES


@torch.no_grad()
def embedding_rows(module: Any, count: int) -> Tensor:
    """``[count, hidden]``, the first rows of a quantized embedding's share, dequantized.

    Raises:
        DrafterError: the lookup does not give plain numbers.
    """
    ids = torch.arange(count, device=_device(module))
    parts = [module.quant_method.embedding(module, part) for part in ids.split(CHUNK)]
    if parts[0].dtype not in PLAIN_DTYPES:
        raise DrafterError(
            f"The target's input embedding is quantized to {parts[0].dtype}, which ReDrafter "
            "cannot read; use a target whose embedding is not quantized."
        )
    return torch.cat(parts)


@torch.no_grad()
def head_rows(module: Any, rows: Tensor) -> Tensor:
    """``[n, hidden]``, rows of a quantized output head's share, dequantized.

    A unit vector is quantized without loss: with a scale of its own, and with a fixed one if it is
    as long as that. A negative one, since int8 kernels of CPUs without VNNI add 128 to what they
    multiply, and the sum of two products of 255 and 127 does not fit into their 16 bits.

    Args:
        rows: ``[n]`` int64.
    """
    width, device = module.embedding_dim, _device(module)
    fixed = getattr(module, "input_scale", None)
    length = float(fixed.max()) if isinstance(fixed, Tensor) else 1.0
    rows = rows.to(device)
    out = torch.empty(len(rows), width, dtype=module.params_dtype, device=device)
    for start in range(0, width, CHUNK):
        columns = torch.arange(start, min(start + CHUNK, width), device=device)
        units = torch.zeros(len(columns), width, dtype=module.params_dtype, device=device)
        units[columns - start, columns] = -length
        products = module.quant_method.apply(module, units, bias=None)
        out[:, columns] = (products[:, rows] / -length).T.to(out.dtype)
    return out


def _device(module: Any) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
