# SPDX-License-Identifier: Apache-2.0
"""Figures by category, by looping and by request, on runs with known times."""

import json
from pathlib import Path

import pytest

from vllm_redrafter.bench.compare import Comparison, Run
from vllm_redrafter.bench.engine_process import Generation, SpecCounters
from vllm_redrafter.bench.engines import Settings
from vllm_redrafter.bench.figures import by_category, figures
from vllm_redrafter.bench.markdown import markdown, table

ROOT = Path(__file__).resolve().parents[2]
PLAIN, TREE = "plain", "4,3,7"
LOOP = [1, 2] * 20


def run(variant, group, seconds, accepted=0):
    spec = SpecCounters(drafts=4, draft_tokens=28, accepted=accepted) if accepted else None
    fields = {} if spec is None else {"spec": spec}
    result = Generation(token_ids=[[1, 2, 3, 4]], seconds=seconds, decode_seconds=seconds, steps=4,
                        texts=["text"], **fields)  # fmt: skip
    return Run(variant, 0, group, (group,), result)


def comparison(runs, batch_size=1):
    names = list(dict.fromkeys(one.variant for one in runs))
    return Comparison(
        target="t", variants=dict.fromkeys(names), settings=Settings(batch_size=batch_size),
        baseline=PLAIN, runs=runs, peak_rss_bytes={}, startup_seconds={},
    )  # fmt: skip


def test_every_category():
    runs = [run(PLAIN, 0, 2.0), run(TREE, 0, 1.0, 4), run(PLAIN, 1, 3.0), run(TREE, 1, 4.0, 1),
            run(PLAIN, 2, 4.0), run(TREE, 2, 2.0, 2)]  # fmt: skip
    categories = ["math", "coding", "math"]
    found = by_category(comparison(runs), categories)
    # 6 s against 3, 6 accepted in 8 drafts; and a loss stays among them.
    assert found["math"] == {"prompts": 2, TREE: {"ratio": 2.0, "acceptance_length": 1.75}}
    assert found["coding"] == {"prompts": 1, TREE: {"ratio": 0.75, "acceptance_length": 1.25}}
    assert figures(comparison(runs), categories)["categories"] == found
    # The time was up before the second prompt; and a batch has no category.
    assert list(by_category(comparison(runs[:2]), categories)) == ["math"]
    assert figures(comparison(runs, batch_size=8), categories)["categories"] == {}


def batch(variant, later, first, accepted):
    """Two requests that run together, of which the first one loops."""
    spec = [SpecCounters(10, 40, n, ()) for n in accepted]
    result = Generation([LOOP, list(range(41))], ["", ""], 9.0, 8.0, 41, request_spec=spec,
                        first_seconds=first, later_seconds=later)  # fmt: skip
    return Run(variant, 0, 0, (0, 1), result)


def test_requests_that_run_together_are_told_apart():
    result = comparison(
        [batch(PLAIN, [3.9, 4.0], [0.5, 0.5], []), batch(TREE, [1.3, 3.2], [0.6, 0.8], [30, 5])],
        batch_size=2,
    )
    found = figures(result)
    ours = found["variants"][TREE]["requests"]
    assert found["looping_groups"] == 1 and list(ours) == ["all", "not looping", "looping"]
    loop, other = ours["looping"], ours["not looping"]
    # 39 and 40 tokens after the first one.
    assert loop["speed_up"]["median"] == pytest.approx(3.0)
    assert other["speed_up"]["median"] == pytest.approx(1.25)
    assert other["per_token_ms"]["median"] == pytest.approx(80.0)
    assert other["first_ms"]["median"] == pytest.approx(800.0)
    assert (loop["acceptance_length"], other["acceptance_length"]) == (4.0, 1.5)
    plain = found["variants"][PLAIN]["requests"]["all"]
    assert plain["speed_up"] is None and plain["acceptance_length"] is None
    assert plain["requests"] == 2


def test_answers_of_one_token_have_no_time_per_token():
    one = Generation([[7]], [""], 1.0, 0.0, 1, first_seconds=[0.2], later_seconds=[0.0])
    summary = comparison([Run(PLAIN, 0, 0, (0,), one)]).summary(PLAIN)
    assert summary.per_token_ms is None and summary.first_ms.median == pytest.approx(200)


def test_energy_is_given_only_where_every_run_has_it():
    def runs(*joules):
        made = [Generation([[1, 2]], [""], 1.0, 1.0, 2, joules=one) for one in joules]
        return comparison([Run(PLAIN, 0, i, (i,), one) for i, one in enumerate(made)])

    assert runs(3.0, 5.0).summary(PLAIN).joules_per_token == pytest.approx(2.0)
    assert runs(3.0, None).summary(PLAIN).joules_per_token is None


def test_a_column_without_figures_is_left_out():
    assert table(("a", "b"), [["1", ""], ["2", ""]]) == ["| a |", "| --- |", "| 1 |", "| 2 |"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/load/*.json")),
                         ids=lambda path: path.stem)  # fmt: skip
def test_older_files_are_still_read(path):
    report = json.loads(path.read_text())
    rows = [line for line in markdown(report).splitlines() if line.startswith("| ")]
    speeds = [f"{parts['all']['tokens_per_second']:.1f}" for result in report["results"]
              for parts in result["variants"].values()]  # fmt: skip
    shown = [row.split(" | ")[3] for row in rows[2 : 2 + len(speeds)]]
    assert shown == speeds
