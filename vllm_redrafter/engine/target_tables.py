# SPDX-License-Identifier: Apache-2.0
"""The target's tables that a drafter reads."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.drafter.config import DrafterError


def target_tables(target: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The target's input embedding and output head weights, ``[rows, hidden]`` each.

    Raises:
        DrafterError: a target whose tables are not where a decoder-only vLLM model has them.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    embeddings = [
        module
        for module in target.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    heads = [module for module in target.modules() if isinstance(module, ParallelLMHead)]
    # A tied head is the embedding itself.
    tables = [group[0].weight for group in (embeddings[:1], (heads or embeddings)[:1]) if group]
    name = type(target).__name__
    if len(tables) < 2:
        raise DrafterError(f"{name} has no input embedding that ReDrafter can read.")
    for table in tables:
        if table.dim() != 2 or not table.is_floating_point():
            raise DrafterError(
                f"{name} keeps its embedding or output head as {table.dtype}; ReDrafter needs "
                "them unquantized."
            )
    return tables[0], tables[1]
