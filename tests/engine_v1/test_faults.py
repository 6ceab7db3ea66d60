# SPDX-License-Identifier: Apache-2.0
"""Whatever fails in drafting costs drafts; whatever fails behind it ends the engine."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from engine_cases.faults import KINDS, fault_at, guard_as_served
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from engine_v1.engines import answers, engine
from engine_v1.oracle import request_tree
from engine_v1.tiny_target import prompts
from vllm_redrafter.engine import draft_guard
from vllm_redrafter.engine.draft_guard import ERRORS_IN_A_ROW, DraftGuard
from vllm_redrafter.engine.thorough import CheckFailed
from vllm_redrafter.engine.v1 import drafting as drafting_module
from vllm_redrafter.engine.v1 import runner as runner_module

GREEDY = SamplingParams(temperature=0, max_tokens=30)
BATCH = prompts(6)


@pytest.fixture(scope="module")
def drafting(target, taught_drafter):
    """Drafts by itself, with drafter, lookup and a measured budget."""
    return engine(target, taught_drafter, spec_node_budget="auto", spec_beam_width=6)


@pytest.fixture(scope="module")
def expected(pair):
    pair.plain.reset()
    return answers(pair.plain.generate(BATCH, GREEDY))


@pytest.fixture
def fresh(monkeypatch):
    """An engine as after its start."""

    def use(one):
        clear(one)
        one.reset()
        guard_as_served(monkeypatch, one.runner, lambda: one.runner.redrafter_stats)
        return one

    return use


def seams(one):
    """(owner, attribute) of everything that a draft is made with."""
    runner = one.runner
    drafting = runner._drafting
    return {
        "the whole draft": (runner, "_draft_trees"),
        "the drafter": (runner.drafter, "draft"),
        "the lookup": (drafting_module, "suffix_lookup"),
        "candidates": (drafting_module, "merge_candidates"),
        "trees": (drafting_module, "choose_tree"),
        "the budget's choice": (drafting_module, "choose"),
        "the plan": (drafting._planner, "plan"),
        "costs of a step": (drafting.costs, "step"),
        "costs of a draft": (drafting.costs, "draft"),
        "observed drafts": (drafting.costs, "observe_draft"),
        "observed steps": (drafting.costs, "observe_step"),
        "observed trees": (drafting, "observe"),
        "trust": (drafting.trust["drafter"], "factors"),
        "a request that ends": (drafting, "forget"),
        "the clock's lap": (runner._clock, "lap"),
        "the clock's start": (runner._clock, "start"),
        "the clock's draft": (runner._clock, "drafted"),
        "the check": (runner_module, "problem_of"),
    }


SEAMS = (
    "the whole draft", "the drafter", "the lookup", "candidates", "trees", "the budget's choice",
    "the plan", "costs of a step", "costs of a draft", "observed drafts", "observed steps",
    "observed trees", "trust", "a request that ends", "the clock's lap", "the clock's start",
    "the clock's draft", "the check",
)  # fmt: skip


@pytest.mark.parametrize("seam", SEAMS)
def test_a_fault_now_and_then(drafting, fresh, expected, seam):
    one = fresh(drafting)
    owner, name = seams(one)[seam]
    with fault_at(owner, name, share=0.5) as fault:
        assert answers(one.generate(BATCH, GREEDY)) == expected
    assert fault.raised, f"{seam} was not reached"
    errors = one.stats["draft_errors"]
    assert sum(errors.values()) == fault.raised, errors


def test_all_seams_are_tried(drafting):
    assert set(SEAMS) == seams(drafting).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error(drafting, fresh, expected, kind):
    one = fresh(drafting)
    with fault_at(one.runner.drafter, "draft", share=0.5, kind=kind) as fault:
        assert answers(one.generate(BATCH, GREEDY)) == expected
    assert one.stats["draft_errors"] == {"drafting": fault.raised}
    assert one.stats["drafts"] > 5, "the other steps draft"


def test_what_stops_a_program_is_no_error_of_drafting(drafting, fresh, monkeypatch):
    one = fresh(drafting)
    with pytest.raises(KeyboardInterrupt):
        one.runner.draft_guard.attempt("drafting", raising(KeyboardInterrupt), None)


def raising(kind):
    def work():
        raise kind

    return work


def test_after_many_in_a_row_nothing_is_drafted_any_more(drafting, fresh, expected, caplog):
    one = fresh(drafting)
    logging.getLogger("vllm").propagate = True
    with (
        caplog.at_level("ERROR", logger="vllm.vllm_redrafter"),
        fault_at(one.runner.drafter, "draft") as fault,
    ):
        assert answers(one.generate(BATCH, GREEDY)) == expected
        assert fault.raised == ERRORS_IN_A_ROW
        assert one.runner.draft_guard.off
        assert answers(one.generate(BATCH, GREEDY)) == expected
        assert fault.calls == ERRORS_IN_A_ROW
    first, last = {id(record): record for record in caplog.records}.values()
    assert "failed at drafting" in first.message and "a fault put here" in caplog.text
    assert first.exc_info and "Traceback" in caplog.text
    assert f"drafts no more on this rank until the engine is restarted: {ERRORS_IN_A_ROW} errors "\
        "in a row at drafting, the last one RuntimeError: a fault put here" in last.message
    assert one.stats["drafts"] == 0
    [said] = one.llm.collective_rpc("redrafter_stats")
    assert said["drafting_off"] and said["draft_errors"] == {"drafting": ERRORS_IN_A_ROW}


def test_errors_that_are_not_in_a_row_switch_nothing_off(drafting, fresh, expected):
    one = fresh(drafting)
    with fault_at(one.runner.drafter, "draft", share=0.6, seed=2) as fault:
        for _ in range(2):
            assert answers(one.generate(BATCH, GREEDY)) == expected
    assert fault.raised > ERRORS_IN_A_ROW
    assert not one.runner.draft_guard.off


def test_control_without_the_guard_the_engine_fails(drafting):
    one = drafting
    one.reset()
    with fault_at(one.runner.drafter, "draft"), pytest.raises(RuntimeError, match="put here"):
        one.generate(BATCH, GREEDY)


def clear(one):
    """No request of a failed run is left."""
    names = list(one.scheduler.requests)
    if not names:
        return
    one.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    one.llm.llm_engine.output_processor.abort_requests(names, internal=True)
    one.runner.execute_model_state = None
    one.reset()
    # The runner hears with the next step what has finished.
    one.generate([[1, 2, 3]], SamplingParams(max_tokens=1))


@pytest.fixture(scope="module", autouse=True)
def nothing_left(pair, drafting):
    yield
    clear(pair.trees)
    clear(drafting)


@pytest.mark.parametrize(
    "owner, name",
    [("module", "walk_trees"), ("runner", "_move_accepted"), ("runner", "_tree_step"),
     ("runner", "_tree_to_verify")],
)  # fmt: skip
def test_faults_of_verification_are_not_swallowed(pair, fresh, owner, name):
    one = fresh(pair.trees)
    pair.plain.reset()
    one.reset(pair.make_oracle(pair.plain.generate(BATCH, GREEDY), one.most_nodes, range(200)))
    where = runner_module if owner == "module" else one.runner
    with fault_at(where, name) as fault, pytest.raises(RuntimeError, match="put here"):
        one.generate(BATCH, GREEDY)
    assert fault.raised
    fresh(one)
    pair.run(BATCH, GREEDY).assert_equal()


# -- garbage -----------------------------------------------------------------------------------


def with_field(**fields):
    """Spoils a field of a tree."""

    def spoil(tree):
        return dataclasses.replace(
            tree, **{name: change(getattr(tree, name)) for name, change in fields.items()}
        )

    return spoil


def put(values, value, at=-1):
    values = values.copy()
    values[at] = value
    return values


GARBAGE = {
    "a parent behind its child": with_field(parents=lambda p: put(p, len(p))),
    "a parent of -1": with_field(parents=lambda p: put(p, -1)),
    "a depth too many": with_field(depths=lambda d: put(d, d[-1] + 1)),
    "a depth of 0": with_field(depths=lambda d: put(d, 0)),
    "another mask": with_field(masks=lambda m: put(m, 1)),
    "a root that sees more": with_field(masks=lambda m: put(m, 3, 0)),
    "a token too large": with_field(tokens=lambda t: put(t, 10**6)),
    "a negative token": with_field(tokens=lambda t: put(t, -1)),
    "a token too few": with_field(tokens=lambda t: t[:-1]),
    "a depth too few": with_field(depths=lambda d: d[:-1]),
    "masks too few": with_field(masks=lambda m: m[:-1]),
    "a NaN": lambda tree: dataclasses.replace(
        tree, probabilities=np.full(len(tree), np.nan, dtype=np.float32)
    ),
    "no tree at all": lambda tree: None,
}


class Spoilt:
    """An oracle whose trees are garbage now and then."""

    def __init__(self, oracle, spoil):
        self.oracle, self.spoil, self.spoilt = oracle, spoil, 0

    def __call__(self, *args):
        trees = self.oracle(*args)
        for i, tree in enumerate(trees):
            if len(tree) > 1 and (self.spoilt + i) % 3 == 0:
                trees[i] = self.spoil(tree)
                self.spoilt += 1
        return trees


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_not_verified(pair, fresh, expected, kind):
    one = fresh(pair.trees)
    pair.plain.reset()
    known = pair.plain.generate(BATCH, GREEDY)
    spoilt = Spoilt(pair.make_oracle(known, one.most_nodes, range(200)), GARBAGE[kind])
    one.reset(lambda *args: spoilt(*args))
    assert answers(one.generate(BATCH, GREEDY)) == expected
    assert spoilt.spoilt > 5
    assert sum(one.stats["draft_errors"].values()) > 3
    assert one.stats["drafts"] > 5, "the other trees are verified"


ALL_NODES = {
    "depths": with_field(depths=lambda d: d + 1),
    # Every node sees itself alone.
    "masks": with_field(masks=lambda m: 1 << np.arange(len(m), dtype=np.int64)[:, None]),
}


@pytest.mark.parametrize("kind", ALL_NODES)
def test_control_unchecked_garbage_gives_wrong_tokens(pair, fresh, expected, monkeypatch, kind):
    monkeypatch.setattr(runner_module, "problem_of", lambda *_: "")
    one = fresh(pair.trees)
    pair.plain.reset()
    known = pair.plain.generate(BATCH, GREEDY)
    spoilt = Spoilt(pair.make_oracle(known, one.most_nodes, range(200)), ALL_NODES[kind])
    one.reset(lambda *args: spoilt(*args))
    assert answers(one.generate(BATCH, GREEDY)) != expected


def test_a_tree_of_more_than_64_rows_is_checked_as_well():
    from vllm_redrafter.engine.v1.tree_check import problem_of

    tree = request_tree(range(99), range(99))
    assert problem_of(tree, 200) == ""
    masks = tree.masks.copy()
    masks[90, 1] ^= 1
    assert "node 90 does not see" in problem_of(dataclasses.replace(tree, masks=masks), 200)


# -- the thorough checks -----------------------------------------------------------------------


@pytest.fixture
def checked(pair, fresh, monkeypatch):
    """Run with an oracle, all checks on."""

    def run(**broken):
        one = fresh(pair.trees)
        monkeypatch.setattr(one.runner, "_thorough", True)
        pair.plain.reset()
        known = pair.plain.generate(BATCH, GREEDY)
        one.reset(pair.make_oracle(known, one.most_nodes, range(200)))
        with monkeypatch.context() as patch:
            for name, value in broken.items():
                patch.setattr(one.runner, name, value)
            return answers(one.generate(BATCH, GREEDY))

    return run


def test_thorough_checks_find_nothing_where_nothing_is_wrong(checked, expected):
    assert checked() == expected


def blind(honest):
    def causal(step):
        tree_step = honest(step)
        return dataclasses.replace(tree_step, masks=torch.full_like(tree_step.masks, 2**20 - 1))

    return causal


@pytest.mark.parametrize(
    "broken, sentence",
    [
        ({"_movers": []}, "1 KV cache groups have 0 movers"),
        ({"_move_accepted": lambda step: None}, "is not where it was moved to, in group 0"),
        ({"_set_tree_positions": lambda step: None}, "positions of a tree are not its depths"),
    ],
    ids=["no movers", "no move", "no positions"],
)
def test_thorough_checks_see_what_is_missing(checked, broken, sentence):
    with pytest.raises(CheckFailed, match=sentence):
        checked(**broken)


def test_thorough_checks_see_another_mask(pair, checked):
    with pytest.raises(CheckFailed, match="the mask of a step is not its tree's"):
        checked(_tree_step=blind(pair.trees.runner._tree_step))


def test_thorough_checks_see_nan_from_attention(checked, monkeypatch):
    from vllm_redrafter.engine import tree_step

    honest = tree_step.tree_attention

    def nan(out, *args):
        honest(out, *args)
        out[-1] = torch.nan

    monkeypatch.setattr(tree_step, "tree_attention", nan)
    with pytest.raises(CheckFailed, match="hold NaN"):
        checked()


@pytest.mark.parametrize("value, on", [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch, value, on):
    from vllm_redrafter.engine.thorough import SWITCH, thorough

    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    assert thorough() is on


def test_the_guard_is_on_when_the_engine_serves_and_not_before(drafting):
    assert drafting.guarded
    guard = DraftGuard(lambda: None)
    with pytest.raises(RuntimeError):
        guard.attempt("drafting", raising(RuntimeError), None)
    assert draft_guard.ERRORS_IN_A_ROW == 10
