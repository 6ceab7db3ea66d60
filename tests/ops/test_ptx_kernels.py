# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of every kernel, run by the PTX interpreter: right, without races, within budget.

The slow half of test_cuda_<operator>.py runs the same code on many more inputs.
"""

from __future__ import annotations

import json
import os

import pytest
from ptx import budgets, compiled, mutate
from ptx.cases import CASES

needs_nvcc = pytest.mark.skipif(
    compiled.cuda.find_nvcc() is None and os.environ.get("VLLM_REDRAFTER_TEST_CUDA_BUILD") != "1",
    reason="no nvcc",
)
MOST_LEFT = 0.15
BUDGETS = json.loads(budgets.FILE.read_text())


@needs_nvcc
@pytest.mark.parametrize("name", CASES)
def test_right_and_within_budget(name):
    assert budgets.exceeded(budgets.measured(name), BUDGETS[name]) == []


@needs_nvcc
def test_every_kernel_has_a_case():
    """Instances for other types and head sizes count as one with theirs."""
    sources = {path.stem for path in (compiled.ROOT / "csrc/cuda").glob("*.cu")}
    assert sources == {source for source, _ in CASES.values()}
    names = {budgets.short(name).split("<")[0] for name in compiled.kernels_of(*sorted(sources))}
    assert names == {kernel.split("<")[0] for budget in BUDGETS.values() for kernel in budget}


def test_a_budget_that_is_exceeded_is_noticed():
    """Negative control: one warp instruction in twenty more, and a kernel that nobody expected."""
    name = "walk"
    more = {k: row | {"warp instructions": row["warp instructions"] * 21 // 20}
            for k, row in BUDGETS[name].items()}  # fmt: skip
    assert budgets.exceeded(BUDGETS[name], BUDGETS[name]) == []
    assert len(budgets.exceeded(more, BUDGETS[name])) == len(more) == 1
    assert budgets.exceeded({"other": {"launches": 1}}, BUDGETS[name])


@needs_nvcc
@pytest.mark.parametrize("name", ["tree of beams", "merged candidates"])
def test_a_deleted_barrier_is_noticed(name):
    tried, left = mutate.survivors(name, ("barrier",), every=1)
    assert tried["barrier"] >= 4 and left == []


@needs_nvcc
@pytest.mark.slow
def test_deleted_barriers_are_noticed():
    """Each one in turn, over all cases. Of those left some order nothing (a thread reads what it
    wrote itself), some do on other inputs only."""
    tried, left = 0, []
    for name in CASES:
        found, survivors = mutate.survivors(name, ("barrier",), every=1)
        tried += found["barrier"]
        left += survivors
    assert tried > 70 and len(left) <= MOST_LEFT * tried, left
