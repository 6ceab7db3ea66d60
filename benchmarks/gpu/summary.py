# SPDX-License-Identifier: Apache-2.0
"""gpu_run.json, gpu_run.md and gpu_run.png, made of whatever stages there are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = (
    "Synthetic acceptance, dummy weights: the whole real pipeline, but which drafted nodes are "
    "accepted is drawn from given rates. Break-even is the number of accepted nodes per step "
    "above which drafting pays, step / plain step - 1; it needs no assumption about acceptance. "
    "Sampling, and so the step, contains the synthetic decision, one kernel, which real acceptance "
    "does without."
)
MODES = ("plain", "chain", "tree")
COLUMNS = ("verify", "sample", "decision", "move", "draft", "rest")


@dataclass(frozen=True)
class Target:
    """One aim: ``value`` is None where it was not measured."""

    name: str
    value: float | None
    aim: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not run"
        met = self.value >= self.aim if self.at_least else self.value <= self.aim
        return "met" if met else "MISSED"


def load(out: Path, state: dict[str, Any], stages: list[str]) -> dict[str, Any]:
    """Results of the stages that are done; None for the others."""
    done = {name for name, one in state["stages"].items() if one["status"] == "done"}
    return {
        name: json.loads((out / f"{name}.json").read_text()) if name in done else None
        for name in stages
    }


def points(result: dict[str, Any] | None) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
    """Rows of a shape by (batch, context), then by mode; those that were not run are left out."""
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"] if result else []:
        if "not_run" not in row:
            found.setdefault((row["batch"], row["context"]), {})[row["mode"]] = row
    return found


def ours(row: dict[str, Any], plain: dict[str, Any]) -> float:
    """Milliseconds of a step that are neither the target's pass nor what plain vLLM does too."""
    own = row["draft"] + row["move"] + row["sample"] - row["decision"] - plain["sample"]
    return max(own, 0.0)


def break_even(row: dict[str, Any], plain: dict[str, Any]) -> float:
    return row["step"] / plain["step"] - 1


def targets(results: dict[str, Any]) -> list[Target]:
    """The aims, at batch 1 of the 7B shape."""
    first = next((m for (b, _), m in sorted(points(results.get("llama-7b")).items()) if b == 1), {})
    plain, tree = first.get("plain"), first.get("tree")
    values: list[float | None] = [None] * 4
    if plain and tree:
        values = [
            ours(tree, plain) / plain["step"],
            tree["verify"] / plain["verify"],
            break_even(tree, plain),
            4.2 * plain["step"] / tree["step"],
        ]
    return [
        Target("draft, walk and move, of a plain 7B step, batch 1", values[0], 0.08),
        Target("verifying the tree / one row, 7B, batch 1, context 2k", values[1], 1.25),
        Target("break-even acceptance, 7B, batch 1", values[2], 0.6),
        Target("speed-up if 4.2 tokens a step are given, 7B, batch 1", values[3], 2.8, True),
    ]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def shape_lines(result: dict[str, Any]) -> list[str]:
    rows = []
    for (batch, context), modes in sorted(points(result).items()):
        plain = modes.get("plain")
        for mode in MODES:
            row = modes.get(mode)
            if row is None:
                continue
            pays = f"{break_even(row, plain):.2f}" if plain and mode != "plain" else ""
            low, high = row["quartiles"]
            parts = [f"{row[name]:.3f}" for name in COLUMNS]
            accepted = f"{row['accepted']:.2f}" if "accepted" in row else ""
            moves = f"{row['moves_per_step']:.1f}" if "accepted" in row else ""
            step = f"{row['step']:.3f} ({low:.3f} to {high:.3f})"
            rows.append([str(batch), str(context), mode, step, *parts, pays, accepted, moves])
    header = ["batch", "context", "mode", "ms a step (quartiles)", "verify", "sample + accept"]
    header += [
        "(decision)",
        "move",
        "draft",
        "rest",
        "**break-even**",
        "accepted",
        "rows moved a step",
    ]
    lines = [HEADER, "", *table(header, rows)]
    lines += [
        f"Not run: {row['mode']}, batch {row['batch']}: {row['not_run']}"
        for row in result["rows"]
        if "not_run" in row
    ]
    return lines


def lossless_lines(result: dict[str, Any]) -> list[str]:
    rows = []
    for dtype, found in result.items():
        if "not_run" in found:
            rows.append([dtype, f"not run: {found['not_run']}", ""])
            continue
        cells = [found["redrafter"], found["plain at batch 1"]]
        rows.append([dtype, *(f"{one['equal']} of {one['total']}" for one in cells)])
    return table(["SmolLM2-135M, greedy", "equal to plain vLLM", "plain vLLM at batch 1"], rows)


def speed_lines(result: dict[str, Any]) -> list[str]:
    rows = []
    for batch, modes in result.items():
        for mode, found in modes.items():
            ratio = found["ratio"]
            spread = (
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
                if ratio
                else "1"
            )
            length = found["acceptance_length"]
            speed = f"{found['tokens_per_second']:.1f}"
            rows.append([batch, mode, speed, spread, f"{length:.2f}" if length else "1"])
    header = ["batch", "mode", "tokens/s", "ratio, median of pairs (quartiles)"]
    return table([*header, "acceptance length"], rows)


def markdown(state: dict[str, Any], results: dict[str, Any]) -> str:
    where = ", ".join(f"{name} {value}" for name, value in state["environment"].items())
    lines = ["# The GPU run", "", f"`benchmarks/gpu/run.py`: {where}.", "", "## Targets", ""]
    rehearsal = state["environment"]["device"].endswith("(rehearsal)")
    if rehearsal:
        lines += ["A rehearsal on the CPU with tiny models: its figures mean nothing.", ""]
    lines += table(
        ["target", "aim", "measured", ""],
        [
            [
                aim.name,
                f"{'at least' if aim.at_least else 'at most'} {aim.aim:g}",
                "" if aim.value is None else f"{aim.value:.3f}",
                "rehearsed" if rehearsal and aim.value is not None else aim.verdict,
            ]
            for aim in targets(results)
        ],
    )
    for name, result in results.items():
        status = state["stages"].get(name, {"status": "not run"})
        lines += ["", f"## {name}", ""]
        if result is None:
            lines.append(f"{status['status']}" + (f": {status['why']}" if "why" in status else ""))
        elif name in ("llama-7b", "llama-3-8b"):
            lines += shape_lines(result)
        elif name == "lossless":
            lines += lossless_lines(result)
        elif name == "smollm2":
            lines += speed_lines(result)
        elif name == "ops":
            lines.append("See ops/ops_gpu.md.")
        else:
            lines += [f"{key}: {value}" for key, value in result.items() if key != "doctor"]
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, Any]) -> str:
    """Step time and break-even over the batch size; '' or why there is no picture."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = [name for name in ("llama-7b", "llama-3-8b") if points(results.get(name))]
    if not shapes:
        return "no picture: no shape was measured"
    colours = dict(zip(MODES, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    figure, axes = pyplot.subplots(2, len(shapes), squeeze=False, figsize=(5 * len(shapes), 7))
    for column, name in enumerate(shapes):
        above, below = axes[0][column], axes[1][column]
        found = sorted(points(results[name]).items())
        for mode in MODES:
            have = [(b, m[mode], m.get("plain")) for (b, _), m in found if mode in m]
            above.plot(
                [b for b, *_ in have],
                [row["step"] for _, row, _ in have],
                "o-",
                label=mode,
                color=colours[mode],
            )
            if mode != "plain":
                pays = [(b, break_even(row, plain)) for b, row, plain in have if plain]
                below.plot(
                    [b for b, _ in pays],
                    [value for _, value in pays],
                    "o-",
                    label=mode,
                    color=colours[mode],
                )
        above.set(
            title=f"{name}, dummy weights", ylabel="ms a step", xlabel="batch", ylim=(0, None)
        )
        below.set(ylabel="break-even: accepted nodes a step", xlabel="batch", ylim=(0, None))
        for axis in (above, below):
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return ""


def write_summary(out: Path, state: dict[str, Any], stages: list[str]) -> None:
    """Write all three files into ``out``."""
    results = load(out, state, stages)
    missing = plot(out / "gpu_run.png", results)
    text = markdown(state, results)
    (out / "gpu_run.md").write_text(f"{text}\n{missing}\n" if missing else text)
    whole = {
        **state,
        "targets": [
            {"name": aim.name, "value": aim.value, "aim": aim.aim, "verdict": aim.verdict}
            for aim in targets(results)
        ],
        "results": {name: result or "not run" for name, result in results.items()},
    }
    (out / "gpu_run.json").write_text(json.dumps(whole, indent=1) + "\n")
