# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: PNG files, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.variants import PLAIN

Report = Mapping[str, Any]

SPEED_UP, ACCEPTANCE = "speed_up.png", "acceptance.png"
STEP, LATENCY = "step_time.png", "latency.png"
NAMES = (SPEED_UP, ACCEPTANCE, STEP, LATENCY)


def draw(report: Report, out: Path) -> list[str]:
    """Draw what there are figures for; returns the names of the files in ``out``."""
    from matplotlib.figure import Figure

    pictures: dict[str, Callable[[Any, Report], bool]] = {
        SPEED_UP: speed_up, ACCEPTANCE: acceptance, STEP: step_time, LATENCY: latency,
    }  # fmt: skip
    drawn = []
    for name, plot in pictures.items():
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        if plot(axes, report):
            figure.savefig(out / name, dpi=120)
            drawn.append(name)
    return drawn


def speed_up(axes: Any, report: Report) -> bool:
    """Speed-up against batch size: medians over batches, quartiles as bars."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for result in report["results"]:
        for name, parts in result["variants"].items():
            if ratio := parts["all"]["ratio"]:
                label = report["labels"][name] + _set(report, result)
                point = (result["batch_size"], ratio["median"], ratio["low"], ratio["high"])
                lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        sizes, middle, low, high = zip(*sorted(points), strict=True)
        bars = [[m - x for m, x in zip(middle, low, strict=True)],
                [x - m for m, x in zip(middle, high, strict=True)]]  # fmt: skip
        axes.errorbar(sizes, middle, yerr=bars, fmt="o-", capsize=3, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    sizes = sorted({result["batch_size"] for result in report["results"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    _finish(axes, "batch size", "tokens/s over plain vLLM's", "speed-up (median, quartiles)")
    return bool(lines)


def acceptance(axes: Any, report: Report) -> bool:
    """Acceptance length against verified nodes; the number beside a point is its batch size."""
    points: dict[str, list[tuple[float, float, int]]] = {}
    for result in report["results"]:
        for name, parts in result["variants"].items():
            whole = parts["all"]
            if whole["acceptance_length"] is not None:
                label = report["labels"][name] + _set(report, result)
                points.setdefault(label, []).append(
                    (whole["nodes_per_step"], whole["acceptance_length"], result["batch_size"])
                )
    for label, shown in points.items():
        axes.plot([p[0] for p in shown], [p[1] for p in shown], "o", label=label)
        for nodes, length, size in shown:
            axes.annotate(str(size), (nodes, length), textcoords="offset points", xytext=(4, 4))
    _finish(axes, "nodes per draft", "tokens per draft", "acceptance (numbers: batch size)")
    return bool(points)


def step_time(axes: Any, report: Report) -> bool:
    """Where a step's time goes: ReDrafter's own parts, and the rest, which is the target's."""
    bars: list[tuple[str, dict[str, float]]] = []
    for result in report["results"]:
        for name, parts in result["variants"].items():
            whole = parts["all"]
            own = dict(whole["part_ms_per_step"])
            rest = whole["ms_per_step"] - sum(own.values())
            label = f"{report['labels'][name]}{_set(report, result)}, {result['batch_size']}"
            bars.append((label, {"target, sampling, scheduling": max(rest, 0.0), **own}))
    kinds = list(dict.fromkeys(kind for _, parts in bars for kind in parts))
    places = range(len(bars))
    left = [0.0] * len(bars)
    for kind in kinds:
        widths = [parts.get(kind, 0.0) for _, parts in bars]
        axes.barh(places, widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [label for label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.figure.set_figheight(max(4.5, 0.22 * len(bars)))
    _finish(axes, "ms per step", None, "where a step's time goes (engine, batch size)")
    return bool(bars)


def latency(axes: Any, report: Report) -> bool:
    """Throughput against latency: through servers where rates were measured, else by batch."""
    lines: dict[str, list[tuple[float, float]]] = {}
    rates = report.get("rates", ())
    for row in rates:
        for name, one in row["servers"].items():
            lines.setdefault(report["labels"][name], []).append(
                (one["tpot_p50_ms"], one["tokens_per_second"])
            )
    for result in () if rates else report["results"]:
        for name, parts in result["variants"].items():
            if per_token := parts["all"].get("per_token_ms"):
                lines.setdefault(report["labels"][name] + _set(report, result), []).append(
                    (per_token["median"], parts["all"]["tokens_per_second"])
                )
    for label, points in lines.items():
        style = "o--" if label.startswith(report["labels"][PLAIN]) else "o-"
        axes.plot([p[0] for p in points], [p[1] for p in points], style, label=label)
    what = "request rates" if rates else "batch sizes"
    _finish(axes, "ms per output token (median)", "tokens/s", f"throughput and latency, by {what}")
    return bool(lines)


def _set(report: Report, result: Mapping[str, Any]) -> str:
    return f", {result['set']}" if len(report.get("sets", ())) > 1 else ""


def _finish(axes: Any, x: str, y: str | None, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
