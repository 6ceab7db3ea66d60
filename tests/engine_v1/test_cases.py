# SPDX-License-Identifier: Apache-2.0
"""The black-box cases on Model Runner V1, and the same answers on V2.

Each runner is compared with plain vLLM on itself, every request of every case. Between the runners
only greedy requests can be compared: plain vLLM draws from a torch generator per request on V1, and
from a hash of seed and position on V2, so that a seed means another answer there.
"""

import json

import pytest
from engine_cases.cases import CASES
from engine_cases.run import assert_same, run_case
from engine_v2.process import PARAMETER, outcomes

# The first comparison waits for the process of V2.
pytestmark = pytest.mark.timeout(1800)


def on_v2(cases):
    """Parameters: a case, and its test in the other process."""
    return pytest.mark.parametrize(
        f"case, {PARAMETER}",
        [
            pytest.param(case, f"v2_cases.py::test_case[{case.name}]", id=case.name)
            for case in cases
        ],
    )


@pytest.fixture(scope="module")
def streams(make_pair):
    """What a case said on V1; it runs once."""
    said = {}

    def get(case):
        if case.name not in said:
            said[case.name] = run_case(case, make_pair, "v1")
        return said[case.name]

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(streams, case):
    streams(case)


@pytest.fixture
def both(streams, request):
    """What a case said on V1 and on V2: its greedy requests, or the others."""

    def get(case, inner, greedy):
        done = outcomes(request.session)
        done.assert_passed(inner)
        v2 = json.loads((done.streams / f"{case.name}.json").read_text(encoding="utf-8"))
        # Through JSON as well, for the same lists.
        v1 = json.loads(json.dumps(streams(case)))
        return ([stream for stream in said if stream["greedy"] is greedy] for said in (v1, v2))

    return get


@on_v2([case for case in CASES if case.has_greedy])
def test_greedy_answers_are_the_same_on_both_runners(both, case, inner):
    v1, v2 = both(case, inner, True)
    assert v1
    assert_same(v2, v1)


@on_v2([case for case in CASES if case.has_seeded])
def test_seeded_answers_are_not_the_same(both, case, inner):
    """If this fails, the runners draw alike by now: then compare these answers too."""
    v1, v2 = both(case, inner, False)
    assert v1 and len(v1) == len(v2)
    assert [stream["completions"] for stream in v1] != [stream["completions"] for stream in v2]


def change(stream, *path, to):
    *way, last = path
    for key in way:
        stream = stream[key]
    stream[last] = to


@pytest.mark.parametrize(
    "path, to",
    [
        (("prompt", 0), 9),
        (("completions", 0, "tokens", 1), 9),
        (("completions", 0, "tokens"), [1]),
        (("completions", 0, "text"), "x"),
        (("completions", 0, "finish_reason"), "length"),
        (("completions", 0, "stop_reason"), 2),
        (("completions", 0, "cumulative_logprob"), -0.3005),
        (("completions", 0, "logprobs"), None),
        (("completions", 0, "logprobs", 0, 0, 0), 9),
        (("completions", 0, "logprobs", 1, 0, 1), "x"),
        (("completions", 0, "logprobs", 1, 0, 2), 2),
        (("completions", 0, "logprobs", 1, 0, 3), -0.2005),
        (("prompt_logprobs", 1, 0, 3), -0.4005),
    ],
)
def test_the_comparison_sees_every_difference(path, to):
    def stream():
        return {
            "prompt": [1, 2],
            "completions": [
                {
                    "tokens": [1, 2],
                    "text": "ab",
                    "finish_reason": "stop",
                    "stop_reason": None,
                    "cumulative_logprob": -0.3,
                    "logprobs": [[[1, "a", 1, -0.1]], [[2, "b", 1, -0.2]]],
                }
            ],
            "prompt_logprobs": [[], [[2, "b", 3, -0.4]]],
        }

    other = stream()
    assert_same([stream()], [other])
    change(other, *path, to=to)
    with pytest.raises(AssertionError):
        assert_same([stream()], [other])
