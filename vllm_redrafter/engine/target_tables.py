# SPDX-License-Identifier: Apache-2.0
"""The target's tables that a drafter reads.

With tensor parallelism vLLM gives every rank a share of the rows, padded so that all shares are of
one size. A draft embeds any token at any depth, so every rank gets the whole embedding, once, at
load: ``vocab_size x hidden_size`` values (1.0 GiB for 128,256 x 4,096 in bfloat16). Of an output
head that the drafter shares only the rows that it scores are copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.drafter.config import DrafterError


def target_tables(target: torch.nn.Module) -> tuple[Tensor, Tensor | ShardedTable]:
    """The target's input embedding and output head weights, ``[rows, hidden]`` each.

    With tensor parallelism all ranks must call this together, and index the head alike.

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
    name = type(target).__name__
    if not embeddings:
        raise DrafterError(f"{name} has no input embedding that ReDrafter can read.")
    # A tied head is the embedding itself.
    modules = embeddings[0], (heads or embeddings)[0]
    for module in modules:
        table = module.weight
        if table.dim() != 2 or not table.is_floating_point():
            raise DrafterError(
                f"{name} keeps its embedding or output head as {table.dtype}; ReDrafter needs "
                "them unquantized."
            )
    embedding, head = modules
    whole = whole_table(embedding)
    if head.weight is embedding.weight:
        return whole, whole
    return whole, ShardedTable(head) if head.tp_size > 1 else head.weight


def whole_table(module: Any) -> Tensor:
    """All rows of a vocabulary-parallel table, ``[>= vocab_size, hidden]``, row i for token i.

    Args:
        module: a ``VocabParallelEmbedding``. Held by one rank, its own weight is returned;
            otherwise a copy without the padding, and all ranks must call together.
    """
    if module.tp_size == 1:
        return module.weight
    # Rows of LoRA's added tokens lie behind a rank's share of the vocabulary.
    share = module.weight[: module.shard_indices.num_org_elements_padded]
    return _group(module).all_gather(share, dim=0)[: module.org_vocab_size]


class ShardedTable:
    """A table whose rows lie on several ranks; indexing fetches rows, on all ranks together.

    Args:
        module: a ``VocabParallelEmbedding`` or ``ParallelLMHead``.

    Attributes:
        shape: ``(vocab_size, hidden_size)``, padding not counted.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.shape = (module.org_vocab_size, module.weight.shape[1])

    def __getitem__(self, ids: Tensor | slice) -> Tensor:
        """``[n, hidden]``, the rows of these tokens.

        Args:
            ids: ``[n]`` int64, or a slice of the vocabulary.
        """
        module, weight = self._module, self._module.weight
        if isinstance(ids, slice):
            ids = torch.arange(self.shape[0])[ids]
        ids = ids.to(weight.device)
        first, end = (
            module.shard_indices.org_vocab_start_index,
            module.shard_indices.org_vocab_end_index,
        )
        rows = weight.new_zeros(len(ids), self.shape[1])
        mine = ((ids >= first) & (ids < end)).nonzero().flatten()
        rows[mine] = weight[ids[mine] - first]
        # Every row has one owner, and the others add zeros: exact in any dtype.
        return _group(module).all_reduce(rows)


def _group(module: Any) -> Any:
    from vllm.distributed.parallel_state import get_tp_group

    return module.parallel_group or get_tp_group()
