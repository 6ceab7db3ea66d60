# SPDX-License-Identifier: Apache-2.0
"""The cost table as a file, and its correction by steps that really ran."""

import dataclasses
import json
import math

import numpy as np
import pytest

from vllm_redrafter.budget.costs import CostTable, CostTableError, between, convex, read_table
from vllm_redrafter.budget.model import CostModel

TABLE = CostTable(
    identity={"machine": "one", "dtype": "float32"},
    rows=((1.0, 0.010), (8.0, 0.012), (32.0, 0.020), (64.0, 0.036)),
    drafts={(4, 3): ((1.0, 0.001), (8.0, 0.004)), (1, 1): ((1.0, 0.0005),)},
    attention=1e-7,
)


def test_there_and_back(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(TABLE.to_json()), encoding="utf-8")
    assert read_table(path, TABLE.identity) == TABLE


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format=2),
        lambda value: value.pop("rows_seconds"),
        lambda value: value.update(rows_seconds=[]),
        lambda value: value.update(rows_seconds=[[2, 0.1], [1, 0.2]]),
        lambda value: value.update(rows_seconds=[[1, -0.1]]),
        lambda value: value.update(rows_seconds=[[1, math.nan]]),
        lambda value: value.update(rows_seconds=5),
        lambda value: value.update(draft_seconds={"4": [[1, 0.1]]}),
        lambda value: value.update(draft_seconds=[1]),
        lambda value: value.update(attention_seconds=-1),
        lambda value: value.update(identity=None),
    ],
)
def test_no_cost_table(change, tmp_path):
    value = TABLE.to_json()
    change(value)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(CostTableError, match="^it is no cost table"):
        read_table(path, TABLE.identity)


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{", '{"format": 1}'])
def test_other_files(text, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CostTableError, match="^it (is no cost table|cannot be read)"):
        read_table(path, TABLE.identity)
    with pytest.raises(CostTableError, match="^it cannot be read"):
        read_table(tmp_path / "none.json", TABLE.identity)


def test_a_table_of_another_machine(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(TABLE.to_json()), encoding="utf-8")
    with pytest.raises(CostTableError, match="measured with machine 'one', and this is 'two'"):
        read_table(path, {"machine": "two"})
    with pytest.raises(CostTableError, match="measured with threads None, and this is '2'"):
        read_table(path, {"threads": "2"})


def test_between_and_behind_the_points():
    points = ((1.0, 10.0), (3.0, 20.0), (5.0, 40.0))
    assert between(points, np.array([1, 2, 3, 4, 6])).tolist() == [10, 15, 20, 30, 50]
    assert between(((2.0, 8.0),), 4.0) == 16  # one point: a line from the origin


def test_noise_makes_no_pass_longer_than_the_lower_hull():
    true = [(1.0, 20.0), (2.0, 20.5), (8.0, 24.0), (16.0, 31.0), (32.0, 46.0), (64.0, 84.0)]
    assert convex(true) == tuple(true)
    assert convex(true[:1]) == tuple(true[:1])
    # A disturbed pass vanishes, and the times of its neighbours stay.
    for at in range(1, 5):
        noisy = [(rows, 3 * ms if i == at else ms) for i, (rows, ms) in enumerate(true)]
        assert convex(noisy) == tuple(point for i, point in enumerate(true) if i != at)
    # Fewer rows take no longer than more.
    assert convex([(1.0, 25.0), *true[1:]]) == ((1.0, 20.5), *true[1:])
    source = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(x), float(y)) for x, y in zip(range(1, 9), source.random(8), strict=True)]
        hull = convex(points)
        slopes = np.diff([y for _, y in hull]) / np.diff([x for x, _ in hull])
        assert (slopes >= 0).all() and (np.diff(slopes) > 0).all()
        assert all(between(hull, x) <= y + 1e-12 for x, y in points) and hull[-1] == points[-1]


def truth(rows, requests, speed=1.0, overhead=0.004, per_request=0.0002, trees=0.001):
    by_table = float(between(TABLE.rows, rows))
    return speed * (by_table + overhead + per_request * requests + trees * (rows > requests))


def run(model, steps, source, **how):
    for _ in range(steps):
        requests = int(source.integers(1, 9))
        rows = requests + int(source.choice([0, 0, 3, 8, 20]))
        model.observe_step(rows, requests, 0.0, truth(rows, requests, **how))


def errors(model, **how):
    return [
        abs(math.log(float(model.step(rows, requests)) / truth(rows, requests, **how)))
        for requests in (1, 4, 8)
        for rows in (requests, requests + 3, requests + 20)
    ]


def test_without_steps_the_table_holds():
    model = CostModel(TABLE)
    assert float(model.step(8, 8)) == pytest.approx(0.012)
    assert model.step(np.array([1, 8]), 1).tolist() == pytest.approx([0.010, 0.012])
    assert float(model.step(8, 8, 1000)) == pytest.approx(0.0121)


def test_overhead_that_the_table_does_not_know_is_found():
    model, source = CostModel(TABLE), np.random.default_rng(0)
    run(model, 200, source)
    assert max(errors(model)) < 0.05


def test_a_machine_that_becomes_twice_as_slow():
    model, source = CostModel(TABLE), np.random.default_rng(1)
    run(model, 200, source)
    run(model, 300, source, speed=2.0)
    assert max(errors(model, speed=2.0)) < 0.06
    run(model, 300, source)
    assert max(errors(model)) < 0.06


def test_one_absurd_step_is_no_evidence():
    model, source = CostModel(TABLE), np.random.default_rng(2)
    run(model, 100, source)
    before = [float(model.step(rows, 4)) for rows in (4, 8, 24)]
    for absurd in (30.0, 1e-6, math.inf, math.nan, 0.0, -1.0):
        model.observe_step(8, 4, 0.0, absurd)
        run(model, 1, source)
    after = [float(model.step(rows, 4)) for rows in (4, 8, 24)]
    assert after == pytest.approx(before, rel=0.05)


def test_absurd_steps_in_a_row_are_believed():
    model, source = CostModel(TABLE), np.random.default_rng(3)
    run(model, 100, source)
    run(model, 60, source, speed=6.0)
    assert max(errors(model, speed=6.0)) < 0.1


def test_steps_that_are_all_alike_keep_the_tables_proportions():
    model = CostModel(TABLE)
    for _ in range(300):
        model.observe_step(8, 8, 0.0, 0.024)
    assert float(model.step(8, 8)) == pytest.approx(0.024, rel=0.01)
    ratio = float(model.step(32, 8) / model.step(8, 8))
    assert 1.1 < ratio < 1.9  # the table says 1.67
    assert float(model.step(9, 8)) > 0.99 * float(model.step(8, 8))


def test_more_rows_are_never_cheaper():
    model, source = CostModel(TABLE), np.random.default_rng(4)
    for _ in range(300):  # noise that has nothing to do with rows
        requests = 4
        rows = requests + int(source.integers(0, 20))
        model.observe_step(rows, requests, 0.0, 0.02 * source.uniform(0.7, 1.4))
    steps = model.step(np.arange(5, 40), 4)
    assert (np.diff(steps) > 0).all()


def test_drafts_are_followed_by_kind_and_batch():
    model = CostModel(TABLE)
    assert model.draft((0, 0), 8) == 0.0 and model.draft((7, 7), 8) == 0.0
    assert model.draft((4, 3), 8) == pytest.approx(0.004)
    for _ in range(100):
        model.observe_draft((4, 3), 8, 0.008)
        model.observe_draft((4, 3), 8, math.nan)
    assert model.draft((4, 3), 8) == pytest.approx(0.008, rel=0.01)
    assert model.draft((4, 3), 1) == pytest.approx(0.001)


def test_a_table_without_drafts_serves():
    assert CostModel(dataclasses.replace(TABLE, drafts={})).draft((4, 3), 1) == 0.0
