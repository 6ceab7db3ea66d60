# SPDX-License-Identifier: Apache-2.0
"""Nodes over the whole batch: the most expected tokens per second, and nothing else."""

import itertools

import numpy as np
import pytest

from vllm_redrafter.budget.policy import MARGIN, choose, choose_alone


def slow(probabilities, seconds, other):
    """Every number of nodes per request is tried."""
    best = (None, 0.0)
    batch, columns = probabilities.shape
    nothing = batch / (seconds[0] + other)
    for counts in itertools.product(range(columns + 1), repeat=batch):
        nodes = sum(counts)
        if nodes >= len(seconds):
            continue
        tokens = batch + sum(probabilities[b, :n].sum() for b, n in enumerate(counts))
        rate = tokens / (seconds[nodes] + other)
        if rate > best[1] and (not nodes or rate >= MARGIN * nothing):
            best = (counts, rate)
    return best


def never_rising(source, batch, columns):
    return -np.sort(-source.random((batch, columns)) ** 2, axis=1)


@pytest.mark.parametrize("seed", range(30))
def test_the_best_of_all_numbers(seed):
    source = np.random.default_rng(seed)
    probabilities = never_rising(source, 3, 4)
    seconds = 1 + np.cumsum(source.random(9 if seed % 2 else 13)) * source.choice([0.02, 0.1, 0.5])
    other = source.choice([0.0, 0.3])
    choice = choose(probabilities, seconds, other)
    counts, rate = slow(probabilities, seconds, other)
    assert choice.rate == pytest.approx(rate)
    assert choice.counts.sum() == sum(counts)
    assert choice.tokens == pytest.approx(
        3 + sum(probabilities[b, :n].sum() for b, n in enumerate(choice.counts))
    )


def test_no_nodes_where_rows_cost_as_much_as_steps():
    choice = choose(np.full((4, 3), 0.9), np.arange(1, 14) * 1.0)
    assert not choice.counts.any() and choice.rate == 4.0


def test_all_nodes_where_rows_cost_nothing():
    choice = choose(np.full((4, 3), 0.05), np.ones(13))
    assert choice.counts.tolist() == [3, 3, 3, 3]


def test_the_limit_of_all_requests_together():
    probabilities = np.array([[0.9, 0.8], [0.7, 0.1]])
    assert choose(probabilities, np.ones(3)).counts.tolist() == [2, 0]
    assert choose(probabilities, np.ones(1)).counts.tolist() == [0, 0]


def test_equal_probabilities_keep_parents_before_children():
    probabilities = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    for limit in range(7):
        counts = choose(probabilities, np.ones(limit + 1)).counts
        assert counts.sum() == limit and counts.max() <= 3


def test_a_gain_within_the_margin_is_none():
    probabilities = np.array([[0.02]])
    assert not choose(probabilities, np.ones(2)).counts.any()


def test_nothing_to_choose_from():
    assert choose(np.zeros((3, 5)), np.ones(16)).counts.tolist() == [0, 0, 0]
    assert choose(np.zeros((2, 0)), np.ones(1)).counts.tolist() == [0, 0]


def test_requests_alone_get_what_the_policy_gives_each():
    source = np.random.default_rng(7)
    probabilities = -np.sort(-source.random((200, 9)) ** 3, axis=1)
    for node, draft in ((0.0, 0.0), (0.05, 0.1), (0.4, 0.0), (3.0, 0.2)):
        seconds = 1 + node * np.arange(10)
        wanted = [choose(row[None], seconds, draft).counts[0] for row in probabilities]
        assert choose_alone(probabilities, seconds, draft).tolist() == wanted
        assert node > 0.3 or len(set(wanted)) > 1
