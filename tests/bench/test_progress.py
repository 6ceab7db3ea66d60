# SPDX-License-Identifier: Apache-2.0
"""The time that is left, on a clock that the test turns."""

import pytest

from vllm_redrafter.bench.batches import Batches
from vllm_redrafter.bench.engines import Settings
from vllm_redrafter.bench.progress import Work, call_weight, in_words, planned
from vllm_redrafter.bench.prompts import PromptSet


def batches(queue=False):
    asked = PromptSet("s", [[1]] * 10)
    variants = {name: {} for name in "abcd"}
    settings = Settings(max_tokens=100, rounds=3)
    return Batches("t", variants, [asked], (1, 4), settings, at_once=3, queue=queue)


def test_calls():
    what = batches()
    assert [list(part) for part in what.parts] == [["plain", "a", "b"], ["plain", "c", "d"]]
    calls = planned(what)
    # Six engines, three rounds; ten prompts, or two full batches of four.
    assert {key: count for key, (count, _) in calls.items()} == {("s", 1): 180, ("s", 4): 36}
    assert calls["s", 4][1] == call_weight(4, 100) > call_weight(1, 100)
    queued = planned(batches(queue=True))
    assert {key: count for key, (count, _) in queued.items()} == {("s", 1): 180, ("s", 4): 18}
    assert queued["s", 4][1] == pytest.approx(2.5 * call_weight(4, 100))


def test_time_left():
    now = [0.0]
    work = Work({("s", 1): (10, 1.0), ("s", 4): (5, 3.0)}, starts=4, server_seconds=40,
                clock=lambda: now[0])  # fmt: skip
    assert work.seconds_left() is None and work.total == 15
    for _ in range(2):
        work.begin()
        now[0] += 7
        work.started()
    assert work.seconds_left() is None
    work.begin()
    now[0] += 8
    work.ran("s", 1, 4)
    # 2 s a unit: 6 and 15 units are left, two starts of 7 s, 40 s of servers.
    assert work.seconds_left() == pytest.approx(2 * 21 + 14 + 40)
    work.served(15)
    assert work.seconds_left() == pytest.approx(2 * 21 + 14 + 25)
    assert (work.done, work.total) == (4, 15)
    work.end = now[0] + 20
    assert work.seconds_left() == 20


def test_words():
    shown = [in_words(seconds) for seconds in (None, 0.2, 45, 400, 9000)]
    assert shown == ["", "about 1 s left", "about 45 s left", "about 7 min left",
                     "about 2.5 h left"]  # fmt: skip
