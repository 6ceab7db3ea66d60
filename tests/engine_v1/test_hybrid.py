# SPDX-License-Identifier: Apache-2.0
"""Trees of beams and of a request's own text, and a budget of nodes: plain vLLM's output."""

import random

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from engine_v1.engines import answers, engine
from engine_v1.tiny_target import EOS, prompts
from vllm_redrafter.budget.costs import CostTable, between
from vllm_redrafter.budget.model import CostModel
from vllm_redrafter.engine.v1 import drafting as module
from vllm_redrafter.engine.v1.clock import StepClock
from vllm_redrafter.engine.v1.drafting import Drafting
from vllm_redrafter.ops.suffix_lookup import suffix_lookup

GREEDY = SamplingParams(temperature=0, max_tokens=60)


class KnownText:
    """Lookup in a text that also holds what the target will say, and copies with mistakes.

    A tiny random target quotes nothing by itself. Copies whose next token is wrong match as long
    as the right one, so the truth is found on any branch.
    """

    def __init__(self, outputs, seed=0):
        self.known = [
            [*output.prompt_token_ids, *completion.token_ids]
            for output in outputs
            for completion in output.outputs
        ]
        self.source = random.Random(seed)

    def __call__(self, text, slots, starts, ends, **sizes):
        rows = [
            self.row(text[int(slot), int(start) : int(end)].tolist())
            for slot, start, end in zip(slots, starts, ends, strict=True)
        ]
        longest = max(map(len, rows))
        wide = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int32)
        count = torch.arange(len(rows), dtype=torch.int32)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        return suffix_lookup(wide, count, torch.zeros_like(count), lengths, **sizes)

    def row(self, own):
        row = []
        for known in self.known:
            if known[: len(own)] == own:
                copies = [list(known) for _ in range(3)]
                for copy in copies[self.source.randint(0, 2) :]:
                    for at in range(len(own), len(copy), self.source.randint(1, 5)):
                        copy[at] = self.source.randrange(EOS)
                self.source.shuffle(copies)
                for copy in copies:
                    row += [*copy, EOS]
        return row + own


@pytest.fixture
def knowing(monkeypatch):
    """Lookups also see these answers."""

    def use(outputs):
        monkeypatch.setattr(module, "suffix_lookup", KnownText(outputs))

    return use


def both(pair, knowing, batch, params, lookup=None):
    """Plain vLLM's answers and those of ReDrafter's own drafts."""
    pair.plain.reset()
    expected = pair.plain.generate(batch, params)
    pair.trees.reset()
    knowing(expected) if lookup is None else lookup(expected)
    return answers(expected), answers(pair.trees.generate(batch, params))


def assert_deep_chains_of_the_lookup(stats, through_others=True):
    assert stats["accepted_by_source"].get("lookup", 0) > 100, stats
    assert len(stats["accepted_by_depth"]) > 8, stats
    assert not through_others or stats["moves"] > 20, stats


def test_deep_chains_through_any_branch(pair, knowing):
    expected, got = both(pair, knowing, prompts(24), GREEDY)
    assert got == expected
    assert_deep_chains_of_the_lookup(pair.trees.stats)


def test_of_the_requests_own_text_alone(pair):
    pair.plain.reset(), pair.trees.reset()
    batch = [prompt * 3 for prompt in prompts(12, longest=20)]
    expected = pair.plain.generate(batch, SamplingParams(temperature=0, max_tokens=150))
    got = pair.trees.generate(batch, SamplingParams(temperature=0, max_tokens=150))
    assert answers(got) == answers(expected)
    assert sum(pair.trees.stats["nodes_by_source"].values()) > 500


def test_seeded_with_penalties_and_logprobs(pair, knowing):
    kinds = [{}, {"temperature": 0}, {"repetition_penalty": 1.2}, {"logprobs": 2}, {"top_p": 0.8}]
    params = [
        SamplingParams(**{"temperature": 1.0, "seed": i, "max_tokens": 50, **kinds[i % 5]})
        for i in range(20)
    ]
    expected, got = both(pair, knowing, prompts(20), params)
    assert got == expected
    assert_deep_chains_of_the_lookup(pair.trees.stats, through_others=False)


def test_preempted(make_pair, knowing):
    pair = make_pair(num_gpu_blocks_override=16)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    expected, got = both(pair, knowing, prompts(12, shortest=20, longest=30), params)
    assert got == expected
    assert pair.trees.preemptions > 3
    assert_deep_chains_of_the_lookup(pair.trees.stats)


def test_prefix_cache_and_chunks_of_prompts(make_pair, knowing):
    pair = make_pair(max_num_batched_tokens=32, enable_prefix_caching=True)
    batch = prompts(8, shortest=60, longest=90)
    for _ in range(2):
        expected, got = both(pair, knowing, batch, GREEDY)
        assert got == expected
    assert_deep_chains_of_the_lookup(pair.trees.stats)


def test_stop_strings_inside_a_chain_and_several_answers(pair, knowing):
    batch = prompts(8)
    pair.plain.reset()
    said = pair.plain.generate(batch, GREEDY)
    params = [
        SamplingParams(temperature=0, max_tokens=60, stop=[output.outputs[0].text[9:11] or "x"])
        for output in said
    ]
    expected, got = both(pair, knowing, batch, params, lookup=lambda _: knowing(said))
    assert got == expected
    several = SamplingParams(temperature=0.9, seed=3, n=3, max_tokens=40)
    expected, got = both(pair, knowing, batch, several)
    assert got == expected


def test_no_deeper_than_what_may_still_be_said(pair, knowing, monkeypatch):
    deepest = []
    honest = module.merge_candidates

    def note(root, beams, chains, most, max_depth):
        found = honest(root, beams, chains, most, max_depth)
        deepest.append(int((found.depths.amax(1) - max_depth).max()))
        return found

    monkeypatch.setattr(module, "merge_candidates", note)
    both(pair, knowing, prompts(6), SamplingParams(temperature=0, max_tokens=9))
    assert len(deepest) > 2 and max(deepest) <= 0


def share_accepted(stats):
    by_source = stats["accepted_by_source"]
    return by_source.get("lookup", 0) / max(1, stats["nodes_by_source"].get("lookup", 0))


def test_controls(pair, knowing, monkeypatch):
    """A text that is not the request's, or not up to date: as exact, but nothing is accepted."""
    batch = prompts(16)
    expected, got = both(pair, knowing, batch, GREEDY)
    honest = share_accepted(pair.trees.stats)

    def stale(known):
        lookup = KnownText(known)
        late = lambda text, slots, starts, ends, **k: lookup(  # noqa: E731
            text, slots, starts, ends - 2, **k
        )
        monkeypatch.setattr(module, "suffix_lookup", late)

    def exchanged(known):
        lookup = KnownText(known)
        turned = lambda text, slots, starts, ends, **k: lookup(  # noqa: E731
            text, slots.roll(1), starts, ends.roll(1), **k
        )
        monkeypatch.setattr(module, "suffix_lookup", turned)

    for broken in (stale, exchanged):
        expected, got = both(pair, knowing, batch, GREEDY, lookup=broken)
        assert got == expected
        assert share_accepted(pair.trees.stats) < 0.5 * honest


# -- the budget ------------------------------------------------------------------------------


def cost_model(row, draft=1e-6):
    """A step costs one, and ``row`` for each further row."""
    rows = tuple((float(n), 1 + row * (n - 1)) for n in (1, 2, 64, 256))
    drafts = {shape: ((1.0, draft), (8.0, 8 * draft)) for shape in ((4, 4), (1, 4), (1, 1))}
    return CostModel(CostTable({}, rows, drafts))


@pytest.fixture
def budgeted(pair, monkeypatch):
    """The pair's engine with a node budget of these costs, which stay as they are."""

    def use(costs, frozen=True):
        runner = pair.trees.runner
        if frozen:
            monkeypatch.setattr(costs, "observe_step", lambda *args: None)
            monkeypatch.setattr(costs, "observe_draft", lambda *args: None)
        made = Drafting(
            runner._options, runner._run_drafter, lambda: runner.redrafter_stats, costs
        )
        monkeypatch.setattr(runner, "_drafting", made)
        return made

    return use


def test_where_rows_are_free_every_node_is_taken(pair, knowing, budgeted):
    budgeted(cost_model(row=0.0))
    expected, got = both(pair, knowing, prompts(16), GREEDY)
    assert got == expected
    assert pair.trees.stats["nodes_per_draft"] > 10


def test_where_rows_cost_a_step_each_no_node_is(pair, knowing, budgeted):
    budgeted(cost_model(row=1.0))
    kinds = [{}, {"repetition_penalty": 1.2}, {"logprobs": 2}, {"temperature": 1.0, "seed": 5}]
    params = [
        SamplingParams(**{"temperature": 0, "max_tokens": 40, **kinds[i % 4]}) for i in range(16)
    ]
    expected, got = both(pair, knowing, prompts(16), params)
    assert got == expected
    stats = pair.trees.stats
    assert stats["drafts"] == 0 and stats["steps_without_nodes"] > 20
    assert stats["share_of_time_without_nodes"] == 1.0


def test_in_between_steps_with_and_without_trees_take_turns(pair, knowing, budgeted):
    budgeted(cost_model(row=0.12))
    kinds = [{}, {"presence_penalty": 0.5}, {"logprobs": 2}, {"temperature": 1.0, "seed": 5}]
    params = [
        SamplingParams(**{"temperature": 0, "max_tokens": 40, **kinds[i % 4]}) for i in range(16)
    ]
    expected, got = both(pair, knowing, prompts(16), params)
    assert got == expected
    stats = pair.trees.stats
    assert stats["drafts"] > 20 and stats["nodes_per_draft"] < 12


def test_the_limit_of_scheduled_rows(make_pair, knowing, monkeypatch):
    """As many nodes as vLLM would schedule: it cuts nothing off."""
    pair = make_pair(max_num_batched_tokens=40)
    expected, got = both(pair, knowing, prompts(8, longest=20), GREEDY)
    assert got == expected


def test_a_machine_that_becomes_slower_in_mid_run(pair, knowing, budgeted, monkeypatch):
    made = budgeted(cost_model(row=0.1), frozen=False)
    clock = FakeClock(made.costs.table, pair.trees.runner)
    monkeypatch.setattr(pair.trees.runner, "_clock", StepClock(clock))
    errors = []
    observe = made.costs.observe_step

    def note(rows, requests, attended, seconds):
        errors.append(abs(np.log(seconds / float(made.costs.step(rows, requests, attended)))))
        observe(rows, requests, attended, seconds)

    monkeypatch.setattr(made.costs, "observe_step", note)
    for slowness in (1.0, 2.0):
        clock.slowness, errors[:] = slowness, []
        for _ in range(2):
            expected, got = both(pair, knowing, prompts(16), GREEDY)
            assert got == expected
        assert len(errors) > 40 and np.median(errors[-15:]) < 0.1


class FakeClock:
    """A step takes what its rows cost, and half a unit that no table knows."""

    def __init__(self, table, runner):
        self.table, self.runner = table, runner
        self.slowness, self.now = 1.0, 0.0

    def __call__(self):
        ran = self.runner._clock._running
        rows = ran.rows if ran else 1
        self.now += self.slowness * (0.5 + float(between(self.table.rows, rows)))
        self.now += ran.draft_seconds if ran else 0.0
        return self.now


def test_measured_at_start_up(target, drafter, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_REDRAFTER_CACHE", str(tmp_path))
    auto = engine(target, drafter, spec_node_budget="auto", max_num_seqs=4)
    costs = auto.runner._drafting.costs
    # At least the smallest and the largest: the convex hull may leave out all between them.
    assert costs is not None and len(costs.table.rows) >= 2 and costs.table.attention > 0
    assert set(costs.table.drafts) == {(4, 3), (1, 3), (1, 1)}
    [kept] = (tmp_path / "costs").iterdir()
    plain = engine(target, max_num_seqs=4)
    batch = prompts(8)
    assert answers(auto.generate(batch, GREEDY)) == answers(plain.generate(batch, GREEDY))
    stats = auto.stats
    assert stats["timed_steps"] > 5 and stats["predicted_step_ms"] > 0
    # A kept file that is none is measured again; a good one is read.
    from vllm_redrafter.engine.v1 import calibrate

    measured = []
    honest = calibrate.measure
    monkeypatch.setattr(
        calibrate, "measure", lambda *args: measured.append(1) or honest(*args)
    )
    auto.runner.measure_costs()
    assert not measured
    kept.write_text("{", encoding="utf-8")
    auto.runner.measure_costs()
    assert measured == [1]
