# SPDX-License-Identifier: Apache-2.0
"""What a step tells its attention, and where a CUDA graph finds it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_redrafter.engine.v2.step_rows import StepRows
from vllm_redrafter.engine.v2.tree_store import TreeStore
from vllm_redrafter.tree.tree import pack_bits

NODES, SLOTS = 3, 6
ALONE = pack_bits(torch.eye(NODES + 1, dtype=torch.bool))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def trees():
    store = TreeStore(SLOTS, NODES, NODES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    extra = torch.randint(0, 16, (SLOTS, NODES + 1, 1), generator=generator)
    store.masks |= extra
    return store


@pytest.fixture
def rows(trees):
    return StepRows(trees, 32, (1, NODES + 1))


def addresses(step):
    tensors = (step.request_index, step.row_start, step.row_count, step.context_lens, step.masks)
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("count", [NODES + 1, 2, 1])
def test_requests_with_as_many_rows_each(rows, trees, count):
    """Padding requests have no context and see themselves alone: no softmax is empty."""
    rows.masks.fill_(-1)
    slots = torch.tensor([5, 2])
    step = rows.uniform(slots, ints(count + 7, count, 0, 0), count, requests=4)
    assert step.covers_all
    assert step.request_index.tolist() == [0, 1, 2, 3]
    assert step.row_start.tolist() == [0, count, 2 * count, 3 * count]
    assert step.row_count.tolist() == [count] * 4
    assert step.context_lens.tolist() == [7, 0, 0, 0]
    assert torch.equal(step.masks[: 2 * count], trees.masks[slots, :count].flatten(0, 1))
    assert torch.equal(step.masks[2 * count :], ALONE[:count].repeat(2, 1))


@pytest.mark.parametrize("count", [NODES + 1, 1])
def test_every_step_is_where_the_capture_was(rows, count):
    captured = rows.uniform(torch.arange(4), ints(*[count] * 4), count, requests=4)
    values = [captured.context_lens.clone(), captured.masks.clone()]
    rows.uniform(torch.arange(6), ints(*[9] * 6), NODES + 1, requests=6)
    later = rows.uniform(torch.tensor([3]), ints(count + 2, 0, 0, 0), count, requests=4)
    assert addresses(later) == addresses(captured)
    assert captured.context_lens.tolist() == [2, 0, 0, 0]
    assert not torch.equal(captured.masks, values[1])
    assert torch.equal(captured.row_start, ints(0, count, 2 * count, 3 * count))


def batch(scheduled, drafts, computed, slots):
    """vLLM's InputBatch as far as it is read; logits rows are a request's last ones."""
    scheduled, drafts = np.array(scheduled, np.int32), np.array(drafts, np.int32)
    ends, logits = scheduled.cumsum(), drafts + 1
    starts = np.concatenate([[0], ends]).astype(np.int32)
    cu_logits = np.concatenate([[0], logits.cumsum()]).astype(np.int32)
    indices = [np.arange(e - n, e) for e, n in zip(ends, logits, strict=True)]
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        num_draft_tokens_per_req=drafts,
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_np=starts,
        cu_num_logits=torch.from_numpy(cu_logits),
        cu_num_logits_np=cu_logits,
        logits_indices=torch.from_numpy(np.concatenate(indices)),
        expanded_idx_mapping=torch.tensor(slots).repeat_interleave(torch.from_numpy(logits)),
        expanded_local_pos=torch.cat([torch.arange(n, dtype=torch.int32) for n in logits]),
        seq_lens=ints(*(np.array(computed) + scheduled)),
    )


def test_trees_beside_prompts(rows, trees):
    """A cut tree, a placeholder behind prompt tokens, a plain row; a prompt is left out."""
    step = rows.mixed(batch([4, 3, 5, 1, 9], [3, 2, 2, 0, 0], [10, 20, 0, 30, 0], [4, 0, 1, 2, 3]))
    assert not step.covers_all
    assert step.masks.shape[0] == 4 + 3 + 5 + 1, "no prompt behind the last tree"
    assert step.request_index.tolist() == [0, 1, 2, 3]
    assert step.row_start.tolist() == [0, 4, 7, 12]
    assert step.row_count.tolist() == [4, 3, 0, 1]
    assert step.context_lens.tolist() == [10, 20, 0, 30]
    assert torch.equal(step.masks[:4], trees.masks[4])
    assert torch.equal(step.masks[4:7], trees.masks[0, :3])
    assert torch.equal(step.masks[12:], trees.masks[2, :1])


def test_steps_without_a_tree(rows):
    assert rows.mixed(batch([5, 9], [2, 0], [0, 0], [0, 1])) is None


def test_trees_of_two_sizes_are_all_that_there_is(rows):
    step = rows.mixed(batch([4, 2], [3, 1], [5, 6], [1, 2]))
    assert step.covers_all and step.row_count.tolist() == [4, 2]
