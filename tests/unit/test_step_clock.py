# SPDX-License-Identifier: Apache-2.0
"""Which steps are timed, and what a time belongs to."""

from vllm_redrafter.engine.v1.clock import StepClock, Timed


class Now:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def test_a_step_of_decoding_is_timed_until_the_next_begins():
    now = Now()
    clock = StepClock(now)
    assert clock.lap(["a", "b"]) is None
    clock.start(["a", "b"], tokens=7, logits_rows=7, attended=300)
    clock.drafted(0.25)
    now.seconds += 2.0
    assert clock.lap(["b", "c"]) == 2.0
    assert clock.timed == Timed(rows=7, requests=2, attended=300, draft_seconds=0.25)


def test_steps_with_prompts_are_not():
    now = Now()
    clock = StepClock(now)
    clock.lap(["a"])
    clock.start(["a"], tokens=40, logits_rows=1, attended=0)
    clock.drafted(0.1)
    now.seconds += 2.0
    assert clock.lap(["a"]) is None and clock.timed is None


def test_waiting_for_work_is_no_step():
    now = Now()
    clock = StepClock(now)
    clock.lap(["a"])
    clock.start(["a"], tokens=1, logits_rows=1, attended=0)
    now.seconds += 60.0
    assert clock.lap(["b"]) is None


def test_a_step_that_never_got_to_its_rows_is_none():
    clock = StepClock(Now())
    clock.lap(["a"])
    assert clock.lap(["a"]) is None
    clock.drafted(1.0)  # nothing runs
