# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard and the README ask for metrics that there are, by labels that they have."""

import json
import re
from pathlib import Path

import pytest
import vllm.v1.metrics.loggers

from vllm_redrafter.engine.prometheus.catalog import (
    COUNTERS,
    INFO,
    INFO_DOCUMENTATION,
    OFF,
    OFF_DOCUMENTATION,
    labels_of_all,
)

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "examples/grafana/redrafter.json").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

WORDS = {"sum", "max", "rate", "by", "ignoring", "group_left", "label_values"}
METRIC = re.compile(r"(\w[\w:]*)\{(.*?)\}")
GROUPING = re.compile(r"\b(?:by|ignoring|group_left) \((.*?)\)")
VLLMS = Path(vllm.v1.metrics.loggers.__file__).read_text(encoding="utf-8")
# Those of vLLM's that the dashboard shows beside ours.
OF_VLLM = {
    name: ("model_name", "engine")
    for name in ("vllm:generation_tokens_total", "vllm:num_requests_running")
}


def expressions():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel, target["expr"], target["legendFormat"]


def problem_of(expression, legend=""):
    """What is wrong with an expression, or None."""
    known, seen, labels = {**labels_of_all(), **OF_VLLM}, [], set()
    for name, matchers in METRIC.findall(expression):
        if name not in known:
            return f"no metric {name}"
        seen.append(name)
        for matcher in filter(None, map(str.strip, matchers.split(","))):
            label = re.match(r"\w+", matcher)[0]
            if label not in known[name]:
                return f"{name} has no label {label}"
    if not seen:
        return "no metric at all"
    for group in GROUPING.findall(expression):
        labels |= {label.strip() for label in group.split(",") if label.strip()}
    for label in labels | set(re.findall(r"\{\{(\w+)\}\}", legend)):
        if not any(label in known[name] for name in seen):
            return f"no label {label}"
    rest = GROUPING.sub("", METRIC.sub("", expression)).replace("[$__rate_interval]", "")
    strange = [word for word in re.findall(r"[A-Za-z_]\w*", rest) if word not in WORDS]
    return f"strange {strange}" if strange else None


def test_every_expression_asks_for_metrics_that_there_are():
    found = list(expressions())
    assert len(found) > 15
    assert [(p["title"], e, problem) for p, e, le in found if (problem := problem_of(e, le))] == []


@pytest.mark.parametrize(
    "expression, legend, problem",
    [
        (
            'sum (rate(redrafter_draft_total{engine="0"}[1m]))',
            "",
            "no metric redrafter_draft_total",
        ),
        ('redrafter_drafts_total{model="m"}', "", "has no label model"),
        ("sum by (depth) (rate(redrafter_drafts_total{}[$__rate_interval]))", "", "no label depth"),
        ("redrafter_drafts_total{}", "{{source}}", "no label source"),
        ("redrafter_drafts_total{} / redrafter_drafts", "", "strange"),
        ("1 + 1", "", "no metric at all"),
    ],
)
def test_the_check_sees_mistakes(expression, legend, problem):
    assert problem in problem_of(expression, legend)


def test_variables_ask_for_metrics_that_there_are():
    variables = DASHBOARD["templating"]["list"]
    queries = [v["query"]["query"] for v in variables if v["name"] != "datasource"]
    assert len(queries) == 2
    for query in queries:
        name, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query).groups()
        assert label in labels_of_all()[name]


def test_every_metric_is_somewhere_on_the_dashboard():
    shown = {name for _, expression, _ in expressions() for name, _ in METRIC.findall(expression)}
    assert set(labels_of_all()) <= shown


def test_what_the_dashboard_takes_from_vllm_is_there():
    for name in OF_VLLM:
        assert f'"{name.removesuffix("_total")}"' in VLLMS
    assert 'labelnames = ["model_name", "engine"]' in VLLMS


def test_the_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_readme_has_every_metric_and_no_other():
    table = re.findall(r"^\| `(redrafter_\w+)` \| (.*?) ?\| (.*?) \|$", README, re.MULTILINE)
    said = {metric.name: (metric.label, metric.documentation) for metric in COUNTERS}
    said |= {OFF: ("", OFF_DOCUMENTATION), INFO: ("its options", INFO_DOCUMENTATION)}
    assert [(name, label.strip(" `"), meaning) for name, label, meaning in table] == [
        (name, *rest) for name, rest in said.items()
    ]
    assert set(said) == set(labels_of_all())
