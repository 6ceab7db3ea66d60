# SPDX-License-Identifier: Apache-2.0
"""The formula of ReDrafter's memory: what follows from its parts."""

from dataclasses import replace

import pytest

from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.engine.v2.memory import MAX_CHUNK_BYTES, extra_memory, widest_step
from vllm_redrafter.options import ReDrafterOptions

OPTIONS = ReDrafterOptions(
    model="m", num_speculative_tokens=32, beam_width=8, draft_length=4, top_k=0
)
LLAMA_7B = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
    "vocab_size": 32000,
    "drafter_bytes": 2,
    "target_bytes": 2,
    "head_dim": 128,
    "multiprocessors": 132,
}


@pytest.fixture
def drafter():
    return DrafterConfig(
        vocab_size=32000, hidden_size=4096, exit_dim=8192, num_draft_layers=2, rnn=True,
        draft_vocab_size=32000, shared_head=False, defaults={},
    )  # fmt: skip


def test_a_7b_target_and_64_requests(drafter):
    """The orders of magnitude: logits of 2112 rows, twice, and a draft's of 512 rows."""
    memory = extra_memory(OPTIONS, drafter, **LLAMA_7B)
    rows = 64 * 33
    assert memory.logits == rows * (32000 + 4096) * 2 + rows * 32000 * 4
    assert 512 * 32000 * 2 < memory.draft < 75_000_000
    assert memory.buffers < 1 << 21 and memory.attention < 20 << 20
    assert memory.peak == memory.buffers + memory.logits
    assert str(memory).startswith("at most 404.3 MiB")


def test_the_limit_is_vllms():
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import MAX_CHUNK_BYTES as of_vllm

    assert of_vllm == MAX_CHUNK_BYTES


def test_a_large_vocabulary_is_sampled_in_chunks(drafter):
    memory = extra_memory(OPTIONS, drafter, **LLAMA_7B | {"vocab_size": 128256})
    assert memory.logits <= 64 * 33 * (128256 + 4096) * 2 + MAX_CHUNK_BYTES


@pytest.mark.parametrize(
    "schedule, budget, rows",
    [
        ((), 8192, 64 * 33),
        ((), 100, 3 * 33),
        (((1, 4, 32), (5, 64, 3)), 8192, 64 * 4),
        (((1, 8, 32), (9, 64, 0)), 8192, 8 * 33),
    ],
)
def test_the_widest_step(schedule, budget, rows):
    options = replace(OPTIONS, num_speculative_tokens_per_batch_size=schedule)
    assert widest_step(options, 64, budget) == rows
