# SPDX-License-Identifier: Apache-2.0
"""What ``Comparison.assert_equal`` takes for equal."""

from types import SimpleNamespace

import pytest

from engine_v1.engines import Comparison


def output(*tokens):
    one = SimpleNamespace(token_ids=tokens, finish_reason="length", stop_reason=None)
    return SimpleNamespace(outputs=[one])


def comparison(ours, plain, again):
    oracle = SimpleNamespace(unknown=0)
    pair = SimpleNamespace(trees=SimpleNamespace(stats={"draft_errors": 0}))
    return Comparison(pair, oracle, [output(plain)], [output(ours)], lambda: [output(again)])


def test_another_answer_than_plains_is_named():
    with pytest.raises(AssertionError, match=r"^request 0: \[\(\[1\].*, plain \[\(\[2\]"):
        comparison(1, 2, 2).assert_equal()


def test_an_answer_that_plain_never_gave_is_wrong_whatever_else_plain_said():
    with pytest.raises(AssertionError, match="^request 0: "):
        comparison(1, 2, 3).assert_equal()


def test_plain_that_differs_from_itself_is_warned_of():
    with pytest.warns(UserWarning, match="^plain vLLM differs from itself: request 0: "):
        comparison(1, 2, 1).assert_equal()


def test_equal_answers_ask_plain_once():
    comparison(1, 1, 2).assert_equal()
