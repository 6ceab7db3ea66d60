# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_faults.py`` on Model Runner V2, where nothing may be read to find them."""

import dataclasses
from contextlib import ExitStack

import pytest
import torch
from engine_cases.faults import KINDS, fault_at, guard_as_served
from engine_v1.engines import answers
from engine_v1.tiny_target import prompts
from vllm import SamplingParams

from engine_v2.own_process.host_reads import HostReads
from vllm_redrafter.engine.draft_guard import ERRORS_IN_A_ROW
from vllm_redrafter.engine.thorough import CheckFailed
from vllm_redrafter.engine.v2 import speculator as module

GREEDY = SamplingParams(temperature=0, max_tokens=16)
BATCH = prompts(4)


@pytest.fixture(scope="module")
def expected(pair):
    pair.plain.reset()
    return answers(pair.plain.generate(BATCH, GREEDY))


@pytest.fixture
def fresh(monkeypatch):
    """An engine as after its start."""

    def use(one):
        one.reset()
        guard_as_served(monkeypatch, one.speculator, lambda: one.state.stats.host)
        return one

    return use


def test_faults_now_and_then_at_every_seam(hybrid, fresh, expected):
    one = fresh(hybrid)
    speculator = one.speculator
    seams = [
        (speculator, "_own_trees"), (speculator, "_draft_trees"), (speculator, "_draft"),
        (speculator, "_lookup"), (module, "hybrid_trees"), (module, "without_bad_trees"),
        (one.state.trees, "put"),
    ]  # fmt: skip
    with ExitStack() as stack:
        faults = [
            stack.enter_context(fault_at(*seam, share=0.12, kind=list(KINDS)[i % 3], seed=i + 22))
            for i, seam in enumerate(seams)
        ]
        for _ in range(2):
            assert answers(one.generate(BATCH, GREEDY)) == expected
    assert all(fault.raised for fault in faults), [fault.raised for fault in faults]
    assert sum(one.stats["draft_errors"].values()) == sum(fault.raised for fault in faults)
    assert one.stats["drafts"] > 5


def test_after_many_in_a_row_nothing_is_drafted_any_more(hybrid, fresh, expected):
    assert hybrid.guarded
    one = fresh(hybrid)
    with fault_at(one.speculator, "_draft") as fault:
        assert answers(one.generate(BATCH, GREEDY)) == expected
    assert fault.calls == ERRORS_IN_A_ROW and one.speculator.draft_guard.off
    [said] = one.llm.collective_rpc("redrafter_stats")
    assert said["drafting_off"] and said["draft_errors"] == {"drafting": ERRORS_IN_A_ROW}
    assert said["drafts"] == 0


def put(values, value, column=3):
    values = values.clone()
    values[::2, column] = value
    return values


def spoil(drafted, kind):
    """Every second request's tree, in its fourth node."""
    tree = drafted.tree
    if kind == "another mask":
        return drafted._replace(masks=put(drafted.masks, 1))
    if kind == "another source":
        return drafted._replace(sources=put(drafted.sources, 9))
    name, value = {
        "a parent behind its child": ("parents", 9),
        "a parent of -1": ("parents", -1),
        "a depth too many": ("depths", tree.depths[::2, 3] + 1),
        "a token too large": ("tokens", 10**6),
        "a negative token": ("tokens", -1),
        "a root with a parent": ("parents", 0),
        "too many nodes": ("num_nodes", 99),
        "no nodes": ("num_nodes", 0),
    }[kind]
    if name == "num_nodes":
        wrong = tree.num_nodes.clone()
        wrong[::2] = value
    else:
        wrong = put(getattr(tree, name), value, 0 if "root" in kind else 3)
    return drafted._replace(tree=dataclasses.replace(tree, **{name: wrong}))


GARBAGE = (
    "another mask", "another source", "a parent behind its child", "a parent of -1",
    "a depth too many", "a token too large", "a negative token", "a root with a parent",
    "too many nodes", "no nodes",
)  # fmt: skip


def test_garbage_is_seen_without_a_read(hybrid, fresh, expected, monkeypatch):
    one = fresh(hybrid)
    honest, steps = module.hybrid_trees, []

    def spoilt(*args):
        steps.append(GARBAGE[len(steps) % len(GARBAGE)])
        return spoil(honest(*args), steps[-1])

    monkeypatch.setattr(module, "hybrid_trees", spoilt)
    with HostReads() as reads:
        got = one.generate(BATCH, GREEDY)
    assert answers(got) == expected and reads.found == []
    assert len(steps) >= len(GARBAGE)
    errors = one.stats["draft_errors"]
    # Every second of one to four requests, at nearly every step.
    assert errors["checking trees"] >= len(steps) - 1, (errors, steps)
    assert one.stats["drafts"] > 5


@pytest.mark.slow
def test_control_unchecked_garbage_gives_wrong_tokens(pair, fresh, expected, monkeypatch):
    one = fresh(pair.trees)
    pair.plain.reset()
    oracle = pair.make_oracle(pair.plain.generate(BATCH, GREEDY), one.most_nodes, range(200))
    honest, alone = oracle.draft, one.state.trees.alone

    def blind(*args):
        drafted = honest(*args)
        return drafted._replace(masks=alone.expand_as(drafted.masks))

    oracle.draft = blind
    one.reset(oracle)
    assert answers(one.generate(BATCH, GREEDY)) != expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, name, value, sentence",
    [
        (None, "", None, ""),
        ("state", "movers", [], "1 KV cache groups have 0 movers"),
        ("state", "_move", lambda *_: None, "is not where it was moved to"),
        ("state", "_depth_shift", lambda batch: 0, "positions of a tree are not its depths"),
    ],
    ids=["nothing wrong", "no movers", "no move", "no positions"],
)
def test_thorough_checks(make_pair, fresh, expected, monkeypatch, owner, name, value, sentence):
    # An engine of its own, which is of no use after a failure.
    pair = make_pair(max_num_seqs=4 + len(name))
    one = fresh(pair.trees)
    pair.plain.reset()
    one.reset(pair.make_oracle(pair.plain.generate(BATCH, GREEDY), one.most_nodes, range(200)))
    monkeypatch.setattr(one.state, "_thorough", True)
    monkeypatch.setattr(one.state.tree_sampler, "thorough", True)
    if owner is None:
        assert answers(one.generate(BATCH, GREEDY)) == expected
        return
    monkeypatch.setattr(one.state, name, value)
    with pytest.raises(CheckFailed, match=sentence):
        one.generate(BATCH, GREEDY)


def test_errors_of_a_kv_move_are_not_swallowed(pair, fresh, monkeypatch):
    one = fresh(pair.trees)
    walk = type("Walk", (), {"path": torch.tensor([[2]])})()
    step = type("Step", (), {})()
    step.walk, step.kv_moved = walk, False
    step.root_rows, step.slot_mappings = torch.tensor([0]), torch.zeros(1, 4, dtype=torch.int64)
    monkeypatch.setattr(one.state, "step", step)

    def fail(*_):
        raise RuntimeError("put here")

    monkeypatch.setattr(one.state, "movers", [fail])
    with pytest.raises(RuntimeError, match="put here"):
        one.state.postprocess_state(None, None)
