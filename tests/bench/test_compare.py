# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a comparison on runs with known times, and the protocol with engines faked."""

import json
import time

import pytest

from vllm_redrafter.bench import compare as compare_module
from vllm_redrafter.bench import engines as engines_module
from vllm_redrafter.bench import report
from vllm_redrafter.bench.compare import (
    Comparison,
    Equality,
    Run,
    compare,
    first_difference,
    turned,
)
from vllm_redrafter.bench.engine_process import (
    EngineFailed,
    Generation,
    SpecCounters,
    machine_cpu_seconds,
)
from vllm_redrafter.bench.engines import Engines, Settings
from vllm_redrafter.bench.own_counters import (
    SOURCES,
    added,
    budget_facts,
    gained,
    shares,
    totals,
)
from vllm_redrafter.tree.candidates import SOURCE_NAMES


def run(variant, round_, group, seconds, ids=(1, 2, 3, 4), **generation):
    defaults = {"decode_seconds": seconds * 0.9, "steps": len(ids), "texts": ["text"]}
    result = Generation(token_ids=[list(ids)], seconds=seconds, **{**defaults, **generation})
    return Run(variant, round_, group, (group,), result)


def comparison(runs, **fields):
    names = list(dict.fromkeys(r.variant for r in runs))
    return Comparison(
        target="t", variants=dict.fromkeys(names), settings=Settings(rounds=2), baseline=names[0],
        runs=runs, peak_rss_bytes=dict.fromkeys(names, 10**9),
        startup_seconds=dict.fromkeys(names, 1.0), **fields,
    )  # fmt: skip


@pytest.fixture
def two_rounds():
    """4 tokens each; plain takes 2, 1, 4, 1 s and fast 1, 1, 1, 2 s."""
    times = {(0, 0): (2, 1), (0, 1): (1, 1), (1, 0): (4, 1), (1, 1): (1, 2)}
    runs = []
    for (round_, group), (plain, fast) in times.items():
        spec = SpecCounters(drafts=2, draft_tokens=10, accepted=3, accepted_at=(2, 1))
        runs.append(run("plain", round_, group, plain))
        runs.append(run("fast", round_, group, fast, steps=3, spec=spec,
                        part_seconds={"draft": 0.01}, fallbacks={"x": 1}))  # fmt: skip
    return comparison(runs)


def test_ratio(two_rounds):
    ratio = two_rounds.ratio("fast")
    # Pairs: 2, 1, 4, 0.5. Seconds: 8 against 5; by round 3 against 2, and 5 against 3.
    assert ratio.overall == pytest.approx(8 / 5)
    assert ratio.median == pytest.approx(1.5)
    assert (ratio.low, ratio.high) == pytest.approx((0.625, 3.5))
    assert ratio.per_round == pytest.approx((3 / 2, 5 / 3))


def test_ratio_of_some_groups(two_rounds):
    ratio = two_rounds.ratio("fast", {0})
    assert ratio.overall == pytest.approx(6 / 2)
    assert ratio.per_round == pytest.approx((2, 4))


def test_ratio_counts_tokens_not_only_time():
    ratio = comparison([run("plain", 0, 0, 2.0), run("fast", 0, 0, 2.0, ids=(1, 2))]).ratio("fast")
    assert ratio.overall == ratio.median == ratio.low == ratio.high == 0.5


def test_summary(two_rounds):
    summary = two_rounds.summary("fast")
    assert summary.tokens_per_second == pytest.approx(16 / 5)
    # 4 runs of 3 steps, the first of each a prefill; 3 of 4 tokens come after it.
    assert summary.tokens_per_step == pytest.approx(12 / 8)
    assert summary.ms_per_step == pytest.approx(1e3 * 0.9 * 5 / 8)
    assert summary.acceptance_length == pytest.approx(1 + 12 / 8)
    assert summary.accepted_at_depth == pytest.approx((1.0, 0.5))
    assert summary.nodes_per_step == pytest.approx(5)
    assert summary.part_ms_per_step == {"draft": pytest.approx(5.0)}
    assert summary.fallbacks == {"x": 4}
    assert summary.peak_rss_bytes == 10**9
    plain = two_rounds.summary("plain")
    assert plain.acceptance_length is None and plain.nodes_per_step is None
    assert plain.accepted_at_depth == () and plain.part_ms_per_step == {}


def test_equality_names_the_first_difference():
    runs = [run("plain", 0, g, 1, ids) for g, ids in enumerate([(1, 2, 3), (1, 2), (5, 6), (7,)])]
    other = [(1, 9, 3), (1, 2, 3), (5, 6), (7,)]
    runs += [run("fast", 0, g, 1, ids) for g, ids in enumerate(other)]
    equality = comparison(runs).equality("fast")
    assert equality == Equality(equal=2, total=4, first_differences=(1, 2))
    assert equality.share == 0.5


def test_equality_counts_prompts_and_wants_every_round():
    runs = []
    for round_, last in enumerate([(3, 3), (4, 3)]):
        for group, token in enumerate(last):
            runs.append(run("plain", round_, group, 1, (1, 3)))
            runs.append(run("fast", round_, group, 1, (1, token)))
    assert comparison(runs).equality("fast") == Equality(equal=1, total=2, first_differences=(1,))


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([5], [], 0)],
)
def test_first_difference(ours, theirs, at):
    assert first_difference(ours, theirs) == at


def test_self_equality_is_against_the_same_prompts():
    runs = [run("plain", r, g, 1, ids) for r in (0, 1) for g, ids in enumerate([(1, 2), (3, 4)])]
    batch = Generation([[1, 2], [3, 5]], ["", ""], 1.0, 1.0, 2)
    both = comparison(
        runs, other_batch_size=8, other_batch_runs=[Run("plain", 0, 0, (0, 1), batch)]
    )
    assert both.self_equality() == Equality(1, 2, (1,))
    assert comparison(runs).self_equality() is None


def test_repeatable(two_rounds):
    assert two_rounds.is_repeatable("plain")
    changed = comparison([run("plain", 0, 0, 1, (1, 2)), run("plain", 1, 0, 1, (1, 3))])
    assert not changed.is_repeatable("plain")


def test_counters_add_and_subtract():
    first = SpecCounters(1, 2, 1, (1,))
    later = SpecCounters(4, 9, 5, (3, 2))
    assert later - first == SpecCounters(3, 7, 4, (2, 2))
    assert first + later == SpecCounters(5, 11, 6, (4, 2))
    assert sum([first, later], SpecCounters()) == first + later


def stats(drafts, accepted, expected, steps, ms, drafter, lookup):
    """As `redrafter_stats` gives them: some are means since start."""
    return {
        "steps": steps, "drafts": drafts, "acceptance_length": 1 + accepted / max(drafts, 1),
        "predicted_acceptance": 1 + expected / max(drafts, 1), "timed_steps": steps,
        "predicted_step_ms": ms, "real_step_ms": 2 * ms, "draft_shapes": {"4,3": steps},
        "accepted_by_source": {"drafter": drafter, "lookup": lookup}, "seconds": {"draft": 1.0},
    }  # fmt: skip


def test_own_counters_are_those_of_the_call_alone():
    idle, before, after = {}, stats(10, 30, 20, 5, 8.0, 25, 5), stats(14, 34, 30, 9, 4.0, 28, 6)
    call = gained(totals(after), totals(before))
    assert call["accepted_by_source"] == {"drafter": 3, "lookup": 1}
    assert shares(call["accepted_by_source"]) == {"drafter": 0.75, "lookup": 0.25}
    # 4 more drafts with 4 accepted of 10 expected; 4 more steps, 9 x 4 ms but 5 x 8 before.
    facts = budget_facts(call)
    assert facts["real_acceptance"] == pytest.approx(2)
    assert facts["predicted_acceptance"] == pytest.approx(3.5)
    assert facts["predicted_step_ms"] == pytest.approx(-1) and facts["real_step_ms"] == -2
    both = budget_facts(added([totals(before), call]))
    assert both == pytest.approx(budget_facts(totals(after)))
    assert totals(idle) == gained({}, {}) == budget_facts({}) == shares({}) == {}
    # An engine that counts less than this version.
    assert totals({"drafts": 3, "seconds": {"draft": 1.0}}) == {"sums": {"drafts": 3}}
    assert budget_facts(totals({"drafts": 3})) == {}


def test_summary_of_own_counters_and_of_some_groups():
    own = [gained(totals(stats(2, n, n, 2, 8.0, n, 1)), {}) for n in (1, 3)]
    runs = [run("plain", 0, g, 1) for g in (0, 1)] + [
        run("fast", 0, g, 1 + g, own=own[g], spec=SpecCounters(2, 10, 2 * g)) for g in (0, 1)
    ]
    summary = comparison(runs).summary("fast")
    assert summary.accepted_by_source == pytest.approx({"drafter": 2 / 3, "lookup": 1 / 3})
    assert summary.draft_shapes == {"4,3": 1.0}
    assert summary.budget["real_acceptance"] == 2 and summary.acceptance_length == 1.5
    second = comparison(runs).summary("fast", {1})
    assert second.accepted_by_source == {"drafter": 0.75, "lookup": 0.25}
    assert second.acceptance_length == 2 and second.tokens_per_second == 2
    assert comparison(runs).summary("plain").budget == {}


def test_looping_answers_are_found():
    loop = [1, 2] * 20
    runs = [run("plain", 0, 0, 1, loop), run("plain", 0, 1, 1, range(40))]
    assert comparison(runs).looping_groups() == {0}


def test_turned():
    assert [turned("abc", i) for i in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]  # fmt: skip


def test_json_is_plain_and_complete(two_rounds, tmp_path):
    two_rounds.save(tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text())
    assert read["ratio"]["fast"]["median"] == 1.5
    assert read["equality"]["fast"]["equal"] == 2
    assert read["baseline_at_other_batch_size"] is None
    assert len(read["runs"]) == 8
    assert read["settings"]["rounds"] == 2


class FakeEngine:
    """Answers each prompt with its own tokens; remembers what it was asked."""

    log: list[tuple[str, int, int]] = []
    fail_at: str | None = None
    stopped: list[str] = []
    started: list[str] = []
    sampled: list[list[dict]] = []

    def __init__(self, name, kwargs, env):
        self.name, self.kwargs, self.env = name, kwargs, env

    def start(self):
        FakeEngine.started.append(f"{self.name} starts")

    def wait_ready(self):
        FakeEngine.started.append(f"{self.name} is ready")
        return 1.0

    def generate(self, prompts, sampling):
        if self.name == self.fail_at:
            raise EngineFailed(f"engine {self.name!r} ended")
        if isinstance(sampling, list):
            assert len(sampling) == len(prompts)
            FakeEngine.sampled.append(sampling)
            sampling = sampling[0]
        FakeEngine.log.append((self.name, len(prompts), sampling["max_tokens"]))
        return Generation([list(p) for p in prompts], [""] * len(prompts), 1.0, 0.9, 3)

    def peak_rss_bytes(self):
        return 5

    def stop(self):
        FakeEngine.stopped.append(self.name)


@pytest.fixture
def fake_engines(monkeypatch):
    FakeEngine.log, FakeEngine.stopped, FakeEngine.fail_at = [], [], None
    FakeEngine.started, FakeEngine.sampled = [], []
    monkeypatch.setattr(engines_module, "EngineProcess", FakeEngine)
    return FakeEngine


def test_variants_alternate_on_the_same_prompts(fake_engines):
    steps = []
    result = compare(
        "t", {"a": None, "b": {"method": "m"}}, [[1], [2, 2], [3]],
        Settings(batch_size=2, rounds=2, max_tokens=7), other_batch_size=1,
        progress=lambda done, total, what: steps.append((done, total)),
    )  # fmt: skip
    timed = [entry for entry in fake_engines.log if entry[2] == 7]
    assert timed == [("a", 2, 7), ("b", 2, 7), ("b", 1, 7), ("a", 1, 7),
                     ("b", 2, 7), ("a", 2, 7), ("a", 1, 7), ("b", 1, 7),
                     ("a", 1, 7), ("a", 1, 7), ("a", 1, 7)]  # fmt: skip
    assert steps[-1] == (11, 11)
    assert result.outputs("b") == {(r, p): ids for r in (0, 1)
                                   for p, ids in enumerate([[1], [2, 2], [3]])}  # fmt: skip
    assert result.equality("b").share == 1.0
    assert result.self_equality() == Equality(3, 3)
    assert sorted(fake_engines.stopped) == ["a", "b"]


def test_running_engines_are_used_and_left_running(fake_engines):
    variants = {"a": None, "b": {"method": "m"}}
    with Engines("t", variants, Settings(), 4) as engines:
        for size in (1, 4):
            result = compare("t", variants, [[1], [2], [3], [4]], Settings(batch_size=size),
                             engines=engines)  # fmt: skip
            assert {len(run.prompts) for run in result.runs} == {size}
            assert result.startup_seconds == {"a": 1.0, "b": 1.0}
        assert fake_engines.stopped == []
    assert sorted(fake_engines.stopped) == ["a", "b"]


def test_engines_start_one_after_the_other(fake_engines):
    with Engines("t", {"a": None, "b": None}, Settings(), 4):
        assert fake_engines.started == ["a starts", "a is ready", "b starts", "b is ready"]


def test_after_the_deadline_no_group_starts(fake_engines, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(compare_module.time, "monotonic", lambda: next(clock))
    prompts, variants = [[1], [2], [3]], {"a": None, "b": None}
    # The first group asks for no time, the second at 0, the third at 1, round 2 at 2 and 3.
    result = compare("t", variants, prompts, deadline=2, other_batch_size=2)
    assert [(run.round, run.group) for run in result.of("b")] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert len(result.of("a")) == 4
    assert result.ratio("b").per_round == (1.0, 1.0)
    assert result.ratio("b", {2}).per_round == (1.0,)
    assert result.self_equality() == Equality(3, 3)
    # The first one always runs; what never ran is not compared.
    result = compare("t", variants, prompts, deadline=0, other_batch_size=2)
    assert [(run.round, run.group) for run in result.of("a")] == [(0, 0)]
    assert result.self_equality() == Equality(1, 1)


def test_sampled_prompts_have_a_seed_of_their_own_on_every_variant(fake_engines):
    settings = Settings(batch_size=2, rounds=2, temperature=1.5, ignore_eos=True)
    compare("t", {"a": None, "b": None}, [[1], [2], [3]], settings)
    timed = [entry for entry in fake_engines.sampled if entry[0]["max_tokens"] == 128]
    seeds = [[one["seed"] for one in entry] for entry in timed]
    assert seeds == [[0, 1], [0, 1], [2], [2]] * 2
    assert {one["temperature"] for entry in timed for one in entry} == {1.5}
    assert all(one["ignore_eos"] for entry in timed for one in entry)


def test_engines_are_stopped_when_one_fails(fake_engines):
    fake_engines.fail_at = "b"
    with pytest.raises(EngineFailed, match="'b'"):
        compare("t", {"a": None, "b": None}, [[1]])
    assert sorted(fake_engines.stopped) == ["a", "b"]


@pytest.mark.parametrize(
    ("variants", "prompts", "baseline"), [({}, [[1]], None), ({"a": None}, [], None),
                                          ({"a": None}, [[1]], "b")],
)  # fmt: skip
def test_bad_arguments(variants, prompts, baseline):
    with pytest.raises(ValueError):
        compare("t", variants, prompts, baseline=baseline)


def test_only_the_own_settings_differ():
    make = engines_module.engine_arguments
    settings = Settings(dtype="float32", num_threads=3, env={"A": "1"})
    plain, plain_env = make("t", None, settings, 8)
    ours, ours_env = make("t", {"method": "m", "env": {"B": "2"}, "llm_kwargs": {"seed": 1}},
                          settings, 8)  # fmt: skip
    assert ours == {**plain, "speculative_config": {"method": "m"}, "seed": 1}
    assert ours_env == {**plain_env, "B": "2"}
    assert plain["dtype"] == "float32" and plain["enable_prefix_caching"] is False
    assert plain_env["OMP_NUM_THREADS"] == "3" and plain_env["A"] == "1"


def test_intel_openmp_is_used_where_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(engines_module.sys, "prefix", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert engines_module.openmp_environment() == {}
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert engines_module.openmp_environment()["LD_PRELOAD"] == str(library)
    monkeypatch.setenv("LD_PRELOAD", "/home/compton/mine.so")
    assert engines_module.openmp_environment()["LD_PRELOAD"] == f"{library}:/home/compton/mine.so"
    monkeypatch.setenv("LD_PRELOAD", "/libgomp.so.1:/mine.so")
    assert engines_module.openmp_environment() == {}


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("", 2), ("0", 2), ("many", 2)])
def test_threads_follow_the_environment(monkeypatch, asked, threads):
    monkeypatch.setattr(engines_module, "physical_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert engines_module.default_threads() == threads


def rendered(thing):
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(thing)
    return console.export_text()


def test_table_shows_the_figures(two_rounds):
    text = rendered(report.results_table(two_rounds, {"plain": "plain vLLM", "fast": "ReDrafter"}))
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
            for line in text.splitlines() if line.count("│") > 3}  # fmt: skip
    assert rows["tokens/s"] == ["2.0", "3.2"]
    assert rows["ratio to plain, all tokens"] == ["–", "1.60"]
    assert rows["median of pairs"] == ["–", "1.50"]
    assert rows["each round alone"] == ["–", "1.50 1.67"]
    assert rows["acceptance length"] == ["–", "2.50"]
    assert rows["accepted at depth 1, 2, ..."] == ["–", "1.00 0.50"]
    assert rows["drafted nodes per step"] == ["–", "5.0"]
    assert rows["outputs equal to plain"] == ["–", "2 of 2 (100 %)"]
    # An engine that does not count who drafted what.
    assert rows["accepted from drafter / lookup / both"] == ["–", "–"]


def test_sources_are_those_of_the_candidates():
    assert SOURCES == tuple(SOURCE_NAMES.values())  # kept apart, so that no torch is imported


def test_table_shows_who_drafted_what_was_accepted():
    own = {"accepted_by_source": {"drafter": 3, "both": 1}}
    runs = [run("plain", 0, 0, 2), run("fast", 0, 0, 1, own=own)]
    text = rendered(report.results_table(comparison(runs), {}))
    (line,) = [line for line in text.splitlines() if "drafter / lookup / both" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["–", "75% / 0% / 25%"]


@pytest.mark.parametrize(
    ("equal", "total", "text"),
    [(8, 8, "8 of 8 (100 %)"), (0, 8, "0 of 8 (0 %)"), (1, 3, "1 of 3 (33 %)"),
     (999, 1000, "999 of 1000 (99 %)"), (1, 1000, "1 of 1000 (1 %)")],
)  # fmt: skip
def test_only_all_is_100_percent(equal, total, text):
    assert report.equality_text(Equality(equal, total)) == text


def test_verdict_names_differences():
    runs = [run("plain", 0, 0, 1, (1, 2)), run("fast", 0, 0, 1, (1, 3))]
    text = report.exactness_line(comparison(runs), "fast").plain
    assert "0 of 1" in text and "token 1" in text and "defect" in text


def test_notes_report_loops_and_the_yardstick():
    loop = [1, 2] * 20
    runs = []
    for group, ids in enumerate([loop, list(range(40))]):
        runs += [run("plain", 0, group, 2, ids), run("fast", 0, group, 1 + group, ids)]
    batch = Generation([loop, loop], ["", ""], 1.0, 1.0, 2)
    notes = report.notes(
        comparison(runs, other_batch_size=8, other_batch_runs=[Run("plain", 0, 0, (0, 1), batch)])
    )
    text = "\n".join(notes)
    assert "1 of 2 answers go in circles" in text and "without them: fast 1.00" in text
    assert "at batch size 8 equals plain vLLM at batch size 1 in 1 of 2 (50 %)" in text


def test_a_busy_machine_is_reported():
    runs = [run(name, 0, 0, 2.0, other_cpu_seconds=1.0) for name in ("plain", "fast")]
    busy = comparison(runs)
    assert busy.other_load() == 0.5
    assert "other programs used 0.5 cores" in "\n".join(report.notes(busy))
    idle = comparison([run(name, 0, 0, 2.0) for name in ("plain", "fast")])
    assert "busy" not in "\n".join(report.notes(idle))


def test_processor_time_of_the_machine_grows_with_work():
    before, own = machine_cpu_seconds(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    # /proc/stat counts in ticks of 10 ms, on every processor.
    assert machine_cpu_seconds() - before >= 0.15
