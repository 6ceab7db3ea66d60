# SPDX-License-Identifier: Apache-2.0
"""The compiled beam_step on the CPU gives its twin's integers."""

from __future__ import annotations

import pytest
import torch
from beam_cases import CASES, SPECIAL, assert_like_the_twin, beam_case, run

from vllm_redrafter.ops import beam_step as module
from vllm_redrafter.ops import reference
from vllm_redrafter.ops.beam_step import beam_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_integers_of_the_twin(each_isa, case, special):
    _, batch, width, first, vocab, top_k, dtype = case
    ids = torch.randperm(vocab) + 1000
    for seed in range(2):
        inputs = beam_case(batch, width, first, vocab, dtype, special, seed)
        found = run(beam_step, CPU, inputs, ids, top_k)
        assert_like_the_twin(found, run(reference.beam_step, CPU, inputs, ids, top_k))


def test_other_tie_breaks_are_noticed():
    """Negative control: ties to the highest row."""
    inputs = beam_case(1, 3, False, 20, torch.float32, "equal", 0)
    found = run(beam_step, CPU, inputs, None, 0)
    reverse = torch.arange(19, -1, -1)
    with pytest.raises(AssertionError, match="tokens"):
        assert_like_the_twin(run(beam_step, CPU, inputs, reverse, 0), found)


def test_threads_make_no_difference(threads):
    inputs = beam_case(4, 8, False, 9000, torch.bfloat16, "none", 0)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(run(beam_step, CPU, inputs, None, 0))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_the_library_the_twin_answers(monkeypatch):
    inputs = beam_case(2, 3, False, 20, torch.float32, "none", 0)
    wanted = run(reference.beam_step, CPU, inputs, None, 0)
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    monkeypatch.setattr(torch.ops.redrafter.beam_step, "default", None)  # a call would be an error
    assert all(
        torch.equal(a, b) for a, b in zip(run(beam_step, CPU, inputs, None, 0), wanted, strict=True)
    )


def test_bad_arguments():
    logits, scores, state = beam_case(2, 3, False, 20, torch.float32, "none", 0)
    with pytest.raises(
        RuntimeError, match="logits has 2 rows a request; it must have one, or the 3"
    ):
        run(beam_step, CPU, (logits[:, :2], scores, state), None, 0)
    with pytest.raises(RuntimeError, match="draft_vocab has 4 elements; it must have 20"):
        run(beam_step, CPU, (logits, scores, state), torch.arange(4), 0)
    with pytest.raises(RuntimeError, match="stride within a row is 3"):
        strided = logits.transpose(1, 2).contiguous().transpose(1, 2)
        run(beam_step, CPU, (strided, scores, state), None, 0)


def test_opcheck():
    logits, scores, state = beam_case(2, 3, False, 20, torch.float32, "none", 0)
    tokens, parents = torch.zeros(2, 2, 3, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.redrafter.beam_step.default,
        (tokens, parents, torch.zeros(2, 3), torch.zeros(2, 3, 5), logits, scores, state, None, 0),
    )
