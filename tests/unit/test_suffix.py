# SPDX-License-Identifier: Apache-2.0
"""The definition of the suffix lookup, on texts small enough to do by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_redrafter.drafter.beam_search import FILLER_SCORE
from vllm_redrafter.lookup.suffix import CERTAINTY, MISS, Chains, suffix_lookup


def look_up(*texts: list[int], **sizes: int) -> Chains:
    width = max(len(text) for text in texts)
    rows = torch.tensor([text + [0] * (width - len(text)) for text in texts], dtype=torch.int32)
    return suffix_lookup(
        rows,
        torch.arange(len(texts), dtype=torch.int32),
        torch.zeros(len(texts), dtype=torch.int32),
        torch.tensor([len(text) for text in texts], dtype=torch.int32),
        **sizes,
    )


def goes_on(m: int) -> float:
    return CERTAINTY * (1 - MISS**m)


def test_the_longest_match_comes_first():
    #        0  1  2  3  4  5  6  7  8
    text = [1, 2, 3, 7, 2, 3, 8, 2, 3]
    # 3 stands at 2 and at 5, each time after a 2; before that are 1, 7 and at the end 8.
    found = look_up(text, chains=3, depth=2)
    assert found.matched.tolist() == [[2, 2, 0]]  # equally long: the recent one first
    assert found.tokens.tolist() == [[[8, 2], [7, 2], [0, 0]]]
    # The older one agrees further.
    found = look_up([8, 2, 3, 5, 9, 2, 3, 6, 8, 2, 3], chains=2, depth=1)
    assert found.matched.tolist() == [[3, 2]] and found.tokens.tolist() == [[[5], [6]]]


def test_a_continuation_that_meets_the_end_is_a_loop():
    found = look_up([4, 5, 6, 4, 5, 6], chains=1, depth=8)
    assert found.matched.tolist() == [[3]]
    assert found.tokens.tolist() == [[[4, 5, 6, 4, 5, 6, 4, 5]]]
    assert look_up([9, 7, 7], chains=1, depth=3).tokens.tolist() == [[[7, 7, 7]]]


def test_limits():
    text = [1, 2, 3] * 4
    assert look_up(text, chains=3, depth=1).matched.tolist() == [[9, 6, 3]]
    assert look_up(text, chains=3, depth=1, longest=2).matched.tolist() == [[2, 2, 2]]
    assert look_up(text, chains=3, depth=1, window=2).matched.tolist() == [[9, 6, 0]]
    # The occurrence of the longest match is not among the most recent ones.
    text = [8, 2, 3, 5, 9, 2, 3, 6, 8, 2, 3]
    assert look_up(text, chains=1, depth=1, window=1).tokens.tolist() == [[[6]]]


@pytest.mark.parametrize("text", [[], [5], [5, 6, 7]])
def test_nothing_is_found(text):
    found = look_up(text, [1] * 4, chains=2, depth=3)
    assert not found.tokens[0].any() and not found.matched[0].any()
    assert (found.scores[0] == FILLER_SCORE).all()
    assert found.tokens.dtype == found.matched.dtype == torch.int64
    assert found.scores.dtype == torch.float32


def test_probability_of_a_single_chain():
    found = look_up([1, 2, 5, 6, 1, 2], chains=4, depth=3)
    assert found.matched.tolist() == [[2, 0, 0, 0]]
    wanted = [goes_on(2), goes_on(2) * goes_on(3), goes_on(2) * goes_on(3) * goes_on(4)]
    assert found.scores[0, 0].exp().tolist() == pytest.approx(wanted)


def test_chains_share_the_probability_until_they_part():
    # After 1: three times 5, then 6, 7 and 6; once 9.
    text = [1, 5, 6, 1, 5, 7, 1, 9, 8, 1, 5, 6, 1]
    found = look_up(text, chains=4, depth=2, longest=1)
    assert found.tokens.tolist() == [[[5, 6], [9, 8], [5, 7], [5, 6]]]
    first, second = goes_on(1), goes_on(1) * goes_on(2)
    wanted = [
        [3 / 4 * first, 3 / 4 * 2 / 3 * second],
        [1 / 4 * first, 1 / 4 * second],
        [3 / 4 * first, 3 / 4 * 1 / 3 * second],
        [3 / 4 * first, 3 / 4 * 2 / 3 * second],
    ]
    assert found.scores[0].exp().flatten().tolist() == pytest.approx(sum(wanted, []))


def test_only_chains_that_are_followed_share():
    text = [1, 5, 6, 1, 5, 7, 1, 9, 8, 1, 5, 6, 1]
    found = look_up(text, chains=2, depth=1, longest=1)
    assert found.tokens.tolist() == [[[5], [9]]]
    assert found.scores[0].flatten().tolist() == pytest.approx([math.log(goes_on(1) / 2)] * 2)


def test_slots_starts_and_ends():
    text = torch.tensor([[1, 2, 1, 3, 1, 4], [7, 7, 8, 7, 7, 9]], dtype=torch.int32)
    numbers = [
        torch.tensor(n, dtype=torch.int32) for n in ([1, 0, 0, 1], [0, 2, 0, 2], [5, 5, 5, 2])
    ]
    found = suffix_lookup(text, *numbers, chains=2, depth=2)
    assert found.matched.tolist() == [[2, 1], [1, 0], [1, 1], [0, 0]]
    assert found.tokens[1].tolist() == [[3, 1], [0, 0]]
    assert found.tokens[2].tolist() == [[3, 1], [2, 1]]
    assert not found.tokens[3].any()


@pytest.mark.parametrize("name", ["chains", "depth", "window", "longest"])
def test_numbers_below_one(name):
    with pytest.raises(ValueError, match=f"{name} 0.* must all be at least 1"):
        look_up([1, 1], **{name: 0})
