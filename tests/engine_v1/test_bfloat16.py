# SPDX-License-Identifier: Apache-2.0
"""bfloat16 runs. Rounding depends on the batch, in plain vLLM too, so equality is not claimed."""

from vllm import SamplingParams

from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts


def test_runs_and_accepts(make_pair):
    pair = make_pair(dtype="bfloat16")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    run = pair.run(prompts(16), params)
    run.assert_saw_trees()
    said = tokens(run.got)
    assert all(len(row) == 40 for row in said)
    # The first token comes before any draft.
    expected = tokens(run.expected)
    assert [row[0] for row in said] == [row[0] for row in expected]
    # A wrong mask, position or move would leave few answers alone.
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 8
