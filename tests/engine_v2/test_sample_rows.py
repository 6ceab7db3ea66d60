# SPDX-License-Identifier: Apache-2.0
"""Logits rows are sampled in parts of whole requests."""

import numpy as np
import pytest
import torch

from vllm_redrafter.engine.v2.sample_rows import SampleRows


def rows_of(counts):
    total, requests = sum(counts), len(counts)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return SampleRows(
        logits=torch.arange(total * 2.0).view(total, 2),
        tokens=torch.arange(total),
        positions=torch.arange(total) + 100,
        slots=torch.arange(requests) + 5,
        slots_np=np.arange(requests) + 5,
        row_slots=torch.repeat_interleave(torch.arange(requests) + 5, torch.tensor(counts)),
        row_nodes=torch.cat([torch.arange(n, dtype=torch.int32) for n in counts]),
        ends=torch.from_numpy(ends),
        ends_np=ends,
        seq_lens_np=np.arange(requests) + 40,
        invalid=torch.arange(total) % 2 == 0,
    )


@pytest.mark.parametrize(
    "counts, most, parts",
    [
        ([4, 4, 4], 12, [3]),
        ([4, 4, 4], 11, [2, 1]),
        ([4, 4, 4], 8, [2, 1]),
        ([4, 4, 4], 7, [1, 1, 1]),
        ([4, 4, 4], 1, [1, 1, 1]),
        ([1, 9, 1, 1], 3, [1, 1, 2]),
        ([2], 1, [1]),
    ],
)
def test_parts(counts, most, parts):
    whole = rows_of(counts)
    cut = list(whole.chunks(most))
    assert [len(part.slots_np) for part in cut] == parts
    for part in cut:
        assert part.ends_np[0] == 0 and part.ends_np[-1] == part.logits.shape[0]
        assert part.ends.tolist() == part.ends_np.tolist()
        assert part.logits.shape[0] <= most or len(part.slots_np) == 1
        assert part.row_slots.unique().tolist() == part.slots.tolist() == part.slots_np.tolist()
    for name in ("logits", "tokens", "positions", "slots", "row_slots", "row_nodes", "invalid"):
        joined = torch.cat([getattr(part, name) for part in cut])
        assert torch.equal(joined, getattr(whole, name)), name
    assert np.concatenate([part.seq_lens_np for part in cut]).tolist() == whole.seq_lens_np.tolist()


def test_one_part_is_the_whole():
    whole = rows_of([3, 2])
    assert next(whole.chunks(5)) is whole
