# SPDX-License-Identifier: Apache-2.0
"""Runs a case on one model runner and writes down what was said there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from engine_cases.cases import Case, greedy, is_greedy

# Log-probabilities are sums in an order that depends on the rows of a step.
TOLERANCE = 1e-4

Stream = dict[str, Any]


def run_case(case: Case, make_pair: Any, runner: str) -> list[Stream]:
    """Plain vLLM and ReDrafter on one runner; all that must hold there is asserted.

    Args:
        make_pair: makes a ``Pair`` of engines with given settings.
        runner: "v1" or "v2".

    Returns:
        what was said, request by request: plain values that can be written as JSON.
    """
    pair = make_pair(**case.settings)
    params, known = case.params, {}
    if callable(params):
        free = _said_by_itself(pair, case)
        params = params([list(output.outputs[0].token_ids) for output in free])
        known = {"answers": free} if case.knows_on else {}
    objects = [sampling_params(row) for row in params]
    run = pair.run(case.prompts, objects, **case.oracle, **known)
    streams = _compare(run)
    if case.again is not None:
        first = [stream["completions"][0]["tokens"] for stream in streams]
        run = pair.run(case.again(case.prompts, first), objects, prefixes=False)
        streams += _compare(run)
        assert all(output.num_cached_tokens >= case.cached for output in run.got)
    stats = pair.trees.stats
    v2 = runner == "v2"
    moves = case.moves_v2 if v2 and case.moves_v2 is not None else case.moves
    run.assert_saw_trees(moves=moves, accepted=case.accepted)
    assert stats["fallbacks"].keys() == (case.fallbacks_v2 if v2 else case.fallbacks_v1), stats
    assert not case.preempts or pair.trees.preemptions > 0
    assert case.shows(streams[: len(params)], params), streams
    for i, stream in enumerate(streams):
        stream["greedy"] = is_greedy(params[i % len(params)])
    return streams


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    fields = dict(fields)
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    return SamplingParams(**fields)


_SAID: dict[tuple[int, str], list[Any]] = {}


def _said_by_itself(pair: Any, case: Case) -> list[Any]:
    """Outputs of plain vLLM to a case's prompts, once for all cases that have the same."""
    key = id(pair.plain), repr(case.prompts)
    if key not in _SAID:
        pair.plain.reset()
        alone = sampling_params(greedy(ignore_eos=True, max_tokens=24))
        _SAID[key] = pair.plain.generate(case.prompts, alone)
    return _SAID[key]


def _compare(run: Any) -> list[Stream]:
    run.assert_equal()
    expected, got = streams_of(run.expected), streams_of(run.got)
    assert_same(got, expected)
    return got


def streams_of(outputs: Sequence[Any]) -> list[Stream]:
    """What vLLM's ``RequestOutput`` objects say."""
    return [
        {
            "prompt": list(output.prompt_token_ids),
            "completions": [
                {
                    "tokens": list(completion.token_ids),
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                    "cumulative_logprob": completion.cumulative_logprob,
                    "logprobs": _rows(completion.logprobs),
                }
                for completion in output.outputs
            ],
            "prompt_logprobs": _rows(output.prompt_logprobs),
        }
        for output in outputs
    ]


def _rows(rows: Any) -> list[list[list[Any]]] | None:
    """(token, text, rank, log-probability) of every entry of every row."""
    if rows is None:
        return None
    return [
        [
            [token, entry.decoded_token, entry.rank, entry.logprob]
            for token, entry in sorted((row or {}).items())
        ]
        for row in rows
    ]


def assert_same(got: Sequence[Stream], expected: Sequence[Stream]) -> None:
    """Equal but for the last digits of log-probabilities."""
    assert [_without_numbers(stream) for stream in got] == [
        _without_numbers(stream) for stream in expected
    ]
    assert _numbers(got) == pytest.approx(_numbers(expected), abs=TOLERANCE)


def _tables(stream: Stream) -> list[Any]:
    return [stream["prompt_logprobs"], *(c["logprobs"] for c in stream["completions"])]


def _without_numbers(stream: Stream) -> Any:
    tables = [
        table and [[entry[:-1] for entry in row] for row in table] for table in _tables(stream)
    ]
    completions = [
        [c[name] for name in ("tokens", "text", "finish_reason", "stop_reason")]
        for c in stream["completions"]
    ]
    return stream["prompt"], completions, tables


def _numbers(streams: Sequence[Stream]) -> list[float]:
    rows = [row for stream in streams for table in _tables(stream) for row in table or []]
    sums = [c["cumulative_logprob"] or 0.0 for stream in streams for c in stream["completions"]]
    return [entry[-1] for row in rows for entry in row] + sums
