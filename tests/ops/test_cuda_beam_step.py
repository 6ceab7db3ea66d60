# SPDX-License-Identifier: Apache-2.0
"""beam_step's CUDA kernels, emulated or on a GPU, give the twin's integers."""

from __future__ import annotations

import pytest
import torch
from beam_cases import CASES, SPECIAL, assert_like_the_twin, beam_case, run

from vllm_redrafter.ops import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_integers_of_the_twin(device_ops, case, special):
    operators, device = device_ops
    _, batch, width, first, vocab, top_k, dtype = case
    ids = torch.randperm(vocab) + 1000
    inputs = beam_case(batch, width, first, vocab, dtype, special, seed=2)
    found = run(operators.beam_step, device, inputs, ids, top_k)
    assert_like_the_twin(found, run(reference.beam_step, CPU, inputs, ids, top_k))


def test_other_tie_breaks_are_noticed(device_ops):
    """Negative control: ties to the highest row."""
    operators, device = device_ops
    inputs = beam_case(1, 3, False, 20, torch.float32, "equal", 0)
    reverse = torch.arange(19, -1, -1)
    found = run(operators.beam_step, device, inputs, reverse, 0)
    with pytest.raises(AssertionError, match="tokens"):
        assert_like_the_twin(found, run(reference.beam_step, CPU, inputs, None, 0))


def test_limits_are_named(device_ops):
    operators, device = device_ops
    inputs = beam_case(1, 3, False, 200, torch.float32, "none", 0)
    with pytest.raises(RuntimeError, match="top_k of 65 is more than the CUDA kernels keep, 64"):
        run(operators.beam_step, device, inputs, None, 65)
