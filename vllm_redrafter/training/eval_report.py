# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation: by groups of answers, as Markdown, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_redrafter.training.answers import Recorded
from vllm_redrafter.training.repeats import LOOPING
from vllm_redrafter.training.replay import SOURCES, TOP, Counts, Outcome, Setting


def summed(outcomes: Sequence[Outcome], setting: Setting) -> Counts:
    total = Counts()
    for outcome in outcomes:
        total.add(outcome.counts[setting])
    return total


def grouped(
    answers: Sequence[Recorded], outcomes: Sequence[Outcome], settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """All answers first, then looping and other ones, then by category (if any has one)."""
    looping = [recorded.looping for recorded in answers]
    members: dict[tuple[str, str], list[int]] = {("all", "all"): list(range(len(answers)))}
    for name, wanted in (("not looping", False), ("looping", True)):
        members["loops", name] = [i for i, is_one in enumerate(looping) if is_one == wanted]
    if any(recorded.category is not None for recorded in answers):
        for name in sorted({recorded.category or "(none)" for recorded in answers}):
            members["category", name] = [
                i for i, recorded in enumerate(answers) if (recorded.category or "(none)") == name
            ]
    groups = []
    for (kind, name), indices in members.items():
        if not indices:
            groups.append({"kind": kind, "name": name, "answers": 0, "tokens": 0,
                           "settings": {}, "depths": []})  # fmt: skip
            continue
        chosen = [outcomes[i] for i in indices]
        results = {}
        for setting in settings:
            total = summed(chosen, setting)
            results[str(setting)] = {
                "drafts": total.drafts,
                "accepted": total.accepted,
                # A number only where something was drafted: JSON has no NaN.
                "acceptance_length": total.acceptance_length if total.drafts else None,
                "nodes_per_draft": total.nodes / total.drafts if total.drafts else None,
                "accepted_by_source": total.by_source,
            }
        hits = torch.stack([outcome.hits for outcome in chosen]).sum(0).tolist()
        depths = [
            {"depth": depth, "positions": n, "top1": top1 / n, f"top{TOP}": top / n}
            for depth, (n, top1, top) in enumerate(hits, start=1)
            if n
        ]
        groups.append({
            "kind": kind, "name": name, "answers": len(indices),
            "tokens": sum(len(answers[i].answer) for i in indices),
            "settings": results, "depths": depths,
        })  # fmt: skip
    return groups


def markdown(report: dict[str, Any], picture: bool) -> str:
    """The report for people.

    Args:
        report: as ``evaluate`` returns it.
        picture: whether acceptance.png lies beside it.
    """
    settings = list(report["groups"][0]["settings"])
    lines = [
        f"# {report['drafter']} for {report['target']}", "",
        f"Offline replay of recorded greedy answers: trees by the rule `{report['tree']}`"
        f"{_lookup(report['lookup_tokens'])}, {_budget(report['node_budget'])}"
        f"the target in {report['dtype']}, the drafter in {report['drafter_dtype']}, top_k "
        f"{report['top_k']}. {report['agreement']:.1%} of the tokens are the target's first choice "
        "as computed here.", "",
        *[f"**Warning:** {text}\n" for text in report["warnings"]],
        report["recommendation"]["why"], "",
        "## Acceptance length", "",
        "1 + accepted tokens / drafts, as vLLM counts; the first token of an answer needs no "
        "draft. The last token of an answer ends it and is never accepted, as in the engine. "
        f"Columns: W,L,N. An answer is looping when more than {LOOPING:.0%} of its 8-grams are "
        "repetitions.", "",
        *_table(
            ["answers", "count", "tokens", *settings],
            [[_cell(g["name"]), str(g["answers"]), str(g["tokens"]),
              *[_number(g["settings"].get(s, {}).get("acceptance_length"), 3) for s in settings]]
             for g in report["groups"]],
        ), "",
    ]  # fmt: skip
    if report["lookup_tokens"]:
        lines += ["## Who drafted what was accepted", "",
                  f"Shares of the accepted tokens: {' / '.join(SOURCES)}, where both means that "
                  "each had drafted the token by itself.", "",
                  *_table(["answers", *settings],
                          [[_cell(g["name"]), *[_shares(g["settings"].get(s)) for s in settings]]
                           for g in report["groups"]]), ""]  # fmt: skip
    if report["predictions"]:
        lines += ["## Predicted speed-up", "",
                  "Not a measurement: acceptance length x a plain step's time / the mean time of a "
                  "step with its draft, from the given costs, without prefill.", "",
                  *_table(["W,L,N", "ms per step", "speed-up"],
                          [[p["setting"], f"{p['step_ms']:.2f}", f"{p['speed_up']:.2f}"]
                           for p in report["predictions"]]), ""]  # fmt: skip
    lines += ["## Accuracy by depth", "",
              "Teacher forced: at every depth the state was fed with the answer's own tokens.", "",
              *_table(["answers", "depth", "positions", "top-1", f"top-{TOP}"],
                      [[_cell(g["name"]), str(d["depth"]), str(d["positions"]),
                        f"{d['top1']:.3f}", f"{d[f'top{TOP}']:.3f}"]
                       for g in report["groups"] for d in g["depths"]]), ""]  # fmt: skip
    lines.append(
        "![acceptance](acceptance.png)" if picture
        else "No acceptance.png: it needs `matplotlib` (pip install 'vllm-redrafter[train]')."
    )  # fmt: skip
    return "\n".join(lines) + "\n"


def _lookup(tokens: int) -> str:
    if not tokens:
        return ""
    return f" from the drafter and from a lookup in the text itself (up to {tokens} tokens)"


def _budget(kind: str) -> str:
    if kind == "fixed":
        return ""
    return "in each step as many nodes as pay by the given costs, "


def _shares(result: dict[str, Any] | None) -> str:
    """``drafter / lookup / both`` of one setting."""
    if not result or not result["accepted"]:
        return ""
    counts = result["accepted_by_source"]
    return " / ".join(f"{counts[name] / result['accepted']:.0%}" for name in SOURCES)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    """A name from the file must not end its cell or its line."""
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Acceptance lengths by setting, and accuracies by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = list(report["groups"][0]["settings"])
    shown = [g for g in report["groups"] if g["kind"] != "category" and g["answers"]]
    for i, group in enumerate(shown):
        heights = [group["settings"][s]["acceptance_length"] or 0 for s in settings]
        places = [at + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for at in range(len(settings))]
        left.bar(places, heights, 0.8 / len(shown), label=f"{group['name']} ({group['answers']})")
    left.set_xticks(range(len(settings)), settings)
    left.set(xlabel="W,L,N", ylabel="tokens per step", title="acceptance length")
    depths = report["groups"][0]["depths"]
    for key in ("top1", f"top{TOP}"):
        right.plot([d["depth"] for d in depths], [d[key] for d in depths], "o-", label=key)
    right.set_xticks([d["depth"] for d in depths])
    right.set(xlabel="depth", ylabel="share", ylim=(0, 1.05), title="right guesses, teacher forced")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
