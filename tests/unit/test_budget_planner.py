# SPDX-License-Identifier: Apache-2.0
"""Which draft is made, and how far probabilities are believed."""

import numpy as np
import pytest

from vllm_redrafter.budget.planner import (
    ENOUGH,
    FULL_AFTER,
    DraftPlanner,
    best_rate,
    draft_shapes,
)
from vllm_redrafter.budget.policy import choose
from vllm_redrafter.budget.trust import (
    HIGHEST,
    LOWEST,
    TRY_AT_LEAST_AFTER,
    Trust,
    kind_of,
)

FULL, CHAIN, ONE, NONE = draft_shapes(4, 3)
DRAFT = {FULL: 0.5, CHAIN: 0.2, ONE: 0.1, NONE: 0.0}  # of a row's step, times the batch


def seconds(batch, shape):
    """Rows are nearly free for few of them, and cost their share from 16 on."""
    rows = batch + np.arange(8 * batch + 1)
    return 10 + 0.05 * rows + 0.5 * np.maximum(rows - 16, 0) + DRAFT[shape] * batch


def candidates(source, batch, scale=1.0):
    full = -np.sort(-source.random((batch, 8)) ** 3, axis=1) * scale
    return {FULL: full, CHAIN: full * 0.8, ONE: full * 0.6, NONE: full * 0.3}


def steps(planner, batch, count, source, scale=1.0):
    """What is planned, step by step."""
    planned = []
    for _ in range(count):
        planned.append(planner.plan(batch))
        if planned[-1] == FULL:
            planner.observe(candidates(source, batch, scale))
    return planned


def test_the_kinds():
    assert draft_shapes(4, 3) == [(4, 3), (1, 3), (1, 1), (0, 0)]
    assert draft_shapes(1, 1) == [(1, 1), (0, 0)]


def test_full_drafts_until_enough_is_known():
    planner, source = DraftPlanner(draft_shapes(4, 3), seconds), np.random.default_rng(0)
    assert steps(planner, 2, ENOUGH // 2, source) == [FULL] * (ENOUGH // 2)


def test_alone_the_full_draft_and_under_load_none():
    planner, source = DraftPlanner(draft_shapes(4, 3), seconds), np.random.default_rng(1)
    assert set(steps(planner, 1, 200, source)[100:]) == {FULL}
    busy = steps(planner, 64, 400, source)[50:]
    assert busy.count(NONE) > 0.9 * len(busy)
    # And back, within as many steps as a decision takes.
    assert set(steps(planner, 1, 200, source)[20:]) == {FULL}


def test_no_turning_to_and_fro_under_constant_load():
    for batch in (1, 4, 16, 24, 32, 64):
        planner, source = DraftPlanner(draft_shapes(4, 3), seconds), np.random.default_rng(batch)
        planned = [shape for shape in steps(planner, batch, 1200, source)[200:]]
        changes = sum(a != b for a, b in zip(planned, planned[1:], strict=False))
        # A look with a full draft is two changes.
        assert changes <= 2 * len(planned) / FULL_AFTER


def test_a_look_is_one_draft_and_looks_become_rarer():
    planner, source = DraftPlanner(draft_shapes(4, 3), seconds), np.random.default_rng(5)
    planned = steps(planner, 64, 900, source, scale=0.05)[100:]
    looks = [at for at, shape in enumerate(planned) if shape == FULL]
    apart = np.diff(looks)
    assert len(looks) >= 3 and apart.min() > FULL_AFTER and (np.diff(apart) >= 0).all()
    # Also where nobody says what a look gave.
    blind = [planner.plan(64) for _ in range(600)]
    assert blind.count(FULL) <= 4


def test_a_look_now_and_then_finds_text_that_became_easy():
    planner, source = DraftPlanner(draft_shapes(4, 3), seconds), np.random.default_rng(2)
    assert steps(planner, 4, 800, source, scale=0.02)[-50:].count(NONE) >= 48
    easy = steps(planner, 4, 8000, source, scale=1.0)
    assert NONE not in easy[-50:]


def test_what_a_batch_gives_is_what_the_policy_chooses():
    source = np.random.default_rng(3)
    for batch in (1, 3, 8):
        kept = candidates(source, 24)[FULL]
        costs = seconds(batch, FULL)
        choices = [choose(kept[at : at + batch], costs) for at in range(0, 24, batch)]
        rate = sum(c.tokens for c in choices) / sum(c.seconds for c in choices)
        assert best_rate(kept, batch, costs) == pytest.approx(rate, rel=0.03)
    assert best_rate(kept[:2], 8, costs) > 0  # fewer are known than run


def test_trust_follows_what_came_true():
    trust = Trust()
    assert trust.factors(["a", "b"], 0).tolist() == [1.0, 1.0]
    for step in range(60):
        trust.observe("a", 2.0, 0, step)
        trust.observe("b", 2.0, 2, step)
    a, b, new = trust.factors(["a", "b", "new"], 60)
    assert a < 0.2 and 0.85 < b <= 1.0 and a < new < b
    trust.forget("a")
    assert trust.factors(["a"], 60) == [new]


def tries(trust, first, last, accepted, kind=0):
    """Steps at which nodes of "a" are verified, if that needs a factor above 0.5."""
    out = []
    for step in range(first, last):
        [factor] = trust.factors(["a"], step, [kind])
        if factor > 0.5:
            out.append(step)
            trust.observe("a", 2.0, accepted, step, kind)
    return out


def test_what_never_comes_true_is_tried_less_and_less_but_never_given_up():
    trust = Trust()
    tried = tries(trust, 0, 2000, accepted=0)
    apart = np.diff(tried)
    assert apart[0] == 1 and (np.diff(apart[apart > 1]) >= 0).all()
    assert apart.max() == TRY_AT_LEAST_AFTER and 2000 - tried[-1] <= TRY_AT_LEAST_AFTER
    # From the first success on the tries are close together, and soon it is trusted again.
    again = tries(trust, 2000, 2400, accepted=2)
    assert again[0] <= 2000 + TRY_AT_LEAST_AFTER and len(again) > 200
    assert trust.factors(["a"], 2400)[0] > 0.8


def test_one_kind_of_sampling_says_nothing_of_another():
    trust, wild = Trust(), kind_of(1.5)
    tries(trust, 0, 400, accepted=0, kind=wild)
    hot, greedy = trust.factors(["new", "other"], 400, [wild, kind_of(0.0)])
    assert hot < 0.5 and greedy == 1.0
    kinds = [kind_of(t) for t in (-1.0, 0.0, 0.1, 0.5, 0.6, 1.0, 1.5, 2.0, 9.0)]
    assert kinds == [0, 0, 1, 1, 2, 2, 3, 4, 8]


def test_factors_have_bounds():
    trust = Trust()
    for step in range(100):
        trust.observe("a", 0.1, 3, step)
        trust.observe("b", 9.0, 0, step, kind=1)
    assert trust.factors(["a", "b"], 100, [0, 1]).tolist() == [HIGHEST, LOWEST]
