# SPDX-License-Identifier: Apache-2.0
"""Rows of vocabulary-parallel tables, by token id, from shares as vLLM divides them."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    VocabParallelEmbedding,
    pad_vocab_size,
)

from vllm_redrafter.engine.target_tables import ShardedTable, whole_table

HIDDEN = 3


class Ranks:
    """A table on several ranks in one process: collectives run once per rank, then combine."""

    def __init__(self, vocab, added, ranks):
        self.table = torch.randn(vocab, HIDDEN)
        padded = pad_vocab_size(vocab)
        total = pad_vocab_size(padded + added)
        self.modules = []
        for rank in range(ranks):
            indices = VocabParallelEmbedding._get_indices(
                total, padded, vocab + added, vocab, rank, ranks
            )
            # Padding and added rows must never be read: here they would show.
            weight = torch.full((total // ranks, HIDDEN), float("nan"))
            mine = self.table[indices.org_vocab_start_index : indices.org_vocab_end_index]
            weight[: len(mine)] = mine
            self.modules.append(
                SimpleNamespace(
                    tp_size=ranks, weight=weight, shard_indices=indices, org_vocab_size=vocab,
                    parallel_group=None,
                )
            )  # fmt: skip

    def collect(self, function, combine):
        """What ``function(module)`` hands to a collective on each rank, combined."""
        handed = []
        for module in self.modules:
            module.parallel_group = SimpleNamespace(
                all_gather=lambda rows, dim: handed.append(rows) or rows,
                all_reduce=lambda rows: handed.append(rows) or rows,
            )
            function(module)
        assert len(handed) == len(self.modules)
        return combine(handed)


@pytest.mark.parametrize(
    "vocab, added, ranks", [(257, 0, 2), (128, 0, 2), (1010, 16, 2), (70, 5, 4)]
)
def test_every_row_is_found(vocab, added, ranks):
    tables = Ranks(vocab, added, ranks)
    gathered = tables.collect(whole_table, torch.cat)
    assert torch.equal(gathered[:vocab], tables.table)
    ids = torch.randperm(vocab)[: vocab // 2]
    found = tables.collect(lambda module: ShardedTable(module)[ids], sum)
    assert torch.equal(found, tables.table[ids])
    found = tables.collect(lambda module: ShardedTable(module)[: vocab - 1], sum)
    assert torch.equal(found, tables.table[:-1])


def test_the_whole_table_has_no_padding():
    [module] = Ranks(257, 0, 1).modules
    module.tp_size = 2
    module.parallel_group = SimpleNamespace(all_gather=lambda rows, dim: torch.cat([rows, rows]))
    assert whole_table(module).shape == (257, HIDDEN)


def test_one_rank_copies_nothing():
    [module] = Ranks(257, 0, 1).modules
    assert whole_table(module) is module.weight
