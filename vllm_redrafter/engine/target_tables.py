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
from vllm_redrafter.engine.quantized_tables import embedding_rows, head_rows, is_plain


def target_tables(
    target: torch.nn.Module, *, head: bool = True
) -> tuple[Tensor, Tensor | ShardedTable | None]:
    """The target's input embedding and output head weights, ``[rows, hidden]`` each.

    Quantized ones are dequantized: the embedding here, once; of the head the rows that are read.

    With tensor parallelism all ranks must call this together, and index the head alike.

    Args:
        head: False for a drafter with an output head of its own; None is returned then.

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
    if not embeddings:
        name = type(target).__name__
        raise DrafterError(f"{name} has no input embedding that ReDrafter can read.")
    embedding = embeddings[0]
    whole = whole_table(embedding)
    if not head:
        return whole, None
    # A tied head is the embedding itself.
    output = (heads or embeddings)[0]
    plain = is_plain(output)
    if output is embedding or (plain and output.weight is embedding.weight):
        return whole, whole
    return whole, output.weight if plain and output.tp_size == 1 else ShardedTable(output)


def whole_table(module: Any) -> Tensor:
    """All rows of a vocabulary-parallel table, ``[>= vocab_size, hidden]``, row i for token i.

    Args:
        module: a ``VocabParallelEmbedding``. Held by one rank and not quantized, its own weight is
            returned; otherwise a copy without the padding, and all ranks must call together.
    """
    plain = is_plain(module)
    if module.tp_size == 1:
        return module.weight if plain else embedding_rows(module, module.org_vocab_size)
    # Rows of LoRA's added tokens lie behind a rank's share of the vocabulary.
    mine = module.shard_indices.num_org_elements_padded
    share = module.weight[:mine] if plain else embedding_rows(module, mine)
    return _group(module).all_gather(share, dim=0)[: module.org_vocab_size]


class ShardedTable:
    """A table that is quantized, or whose rows lie on several ranks; indexing fetches rows.

    With tensor parallelism all ranks must index it together, and alike.

    Args:
        module: a ``VocabParallelEmbedding`` or ``ParallelLMHead``.

    Attributes:
        shape: ``(vocab_size, hidden_size)``, padding not counted.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._plain = module, is_plain(module)
        width = module.weight.shape[1] if self._plain else module.embedding_dim
        self.shape = (module.org_vocab_size, width)

    def __getitem__(self, ids: Tensor | slice) -> Tensor:
        """``[n, hidden]``, the rows of these tokens.

        Args:
            ids: ``[n]`` int64, or a slice of the vocabulary.
        """
        module = self._module
        if isinstance(ids, slice):
            ids = torch.arange(self.shape[0])[ids]
        first, end = (
            module.shard_indices.org_vocab_start_index,
            module.shard_indices.org_vocab_end_index,
        )
        mine = ((ids >= first) & (ids < end)).nonzero().flatten()
        found = self._rows(ids[mine] - first)
        if module.tp_size == 1:
            return found
        mine = mine.to(found.device)
        rows = found.new_zeros(len(ids), self.shape[1]).index_copy_(0, mine, found)
        # Every row has one owner, and the others add zeros: exact in any dtype.
        return _group(module).all_reduce(rows)

    def _rows(self, rows: Tensor) -> Tensor:
        """``[n, hidden]``, of this rank's share."""
        if not self._plain:
            return head_rows(self._module, rows)
        weight = self._module.weight
        return weight[rows.to(weight.device)]


def _group(module: Any) -> Any:
    from vllm.distributed.parallel_state import get_tp_group

    return module.parallel_group or get_tp_group()
