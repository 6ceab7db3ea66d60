# SPDX-License-Identifier: Apache-2.0
"""The compiled argmax finds what torch's and vLLM's sampler's do, ties and NaN included."""

from __future__ import annotations

import pytest
import torch

from vllm_redrafter.ops import argmax_rows as module
from vllm_redrafter.ops.argmax_rows import argmax_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the sizes of vectors and of blocks of four vectors, and a vocabulary.
COLUMNS = [1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 129, 1000, 49152]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_as_torch(each_isa, dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    # Few different values, so that there are ties; rows in any order, some twice.
    values = torch.randint(-9, 9, (12, columns), generator=generator).to(dtype)
    values[3] = torch.randn(columns, generator=generator).to(dtype)
    values[4] = float("-inf")
    values[5, columns // 2] = float("inf")
    values[6, -1] = 100
    values[7, columns // 2 :] = float("nan")
    values[8, -1] = float("nan")
    values[9] = torch.where(torch.rand(columns, generator=generator) > 0.5, 0.0, -0.0).to(dtype)
    rows = torch.tensor([11, 0, 3, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2])
    assert torch.equal(argmax_rows(values, rows), values[rows].float().argmax(-1))


def test_every_place_is_found(each_isa):
    values = torch.eye(150)
    assert argmax_rows(values, torch.arange(150)).tolist() == list(range(150))
    assert argmax_rows(-values, torch.arange(150)).tolist() == [1] + [0] * 149


def test_ties_as_in_vllms_sampler():
    from vllm.v1.sample.sampler import Sampler

    values = torch.randint(3, (40, 5000), generator=torch.Generator().manual_seed(1)).float()
    wanted = Sampler.greedy_sample(values)
    assert torch.equal(argmax_rows(values, torch.arange(40)), wanted)
    # Control: the last of equal values is another one.
    assert not torch.equal(4999 - values.flip(-1).argmax(-1), wanted)


def test_rows_of_any_stride_and_none():
    values = torch.randn(20, 300)[::3, :128]
    rows = torch.tensor([6, 2])
    assert torch.equal(argmax_rows(values, rows), values[rows].argmax(-1))
    assert argmax_rows(values, rows[:0]).shape == (0,)


def test_threads_change_nothing(threads):
    values, rows = torch.randn(33, 49152).bfloat16(), torch.arange(33)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(argmax_rows(values, rows).tolist())
    assert found[0] == found[1] == found[2] == values.float().argmax(-1).tolist()


def test_without_the_compiled_operator(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    values, rows = torch.randn(5, 30), torch.tensor([4, 0])
    assert torch.equal(argmax_rows(values, rows), values[rows].argmax(-1))


@pytest.mark.parametrize(
    "values, rows, said",
    [
        (torch.zeros(3, 4), [3], "rows holds 3; with 3 rows of values it must be 0 to 2"),
        (torch.zeros(3, 4), [-1], "rows holds -1"),
        (torch.zeros(3, 4, dtype=torch.float64), [0], "must be float32, bfloat16 or float16"),
        (torch.zeros(3, 0), [0], "values has no columns"),
        (torch.zeros(4, 3).T, [0], "contiguous rows"),
        (torch.zeros(3), [0], "values has 1 dimensions"),
    ],
)
def test_bad_arguments(values, rows, said):
    with pytest.raises(RuntimeError, match=said):
        argmax_rows(values, torch.tensor(rows))


def test_opcheck():
    torch.library.opcheck(
        torch.ops.redrafter.argmax_rows.default,
        (torch.empty(2, dtype=torch.int64), torch.randn(4, 70), torch.tensor([3, 1])),
    )
