# SPDX-License-Identifier: Apache-2.0
"""Recorded steps as trees in a terminal: drafted nodes, who drafted them, what was accepted."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.text import Text
from rich.tree import Tree

from vllm_redrafter.engine.v1.recording import RecordedStep

Decode = Callable[[list[int]], str]

FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLOURS = {"drafter": "cyan", "lookup": "magenta", "both": "yellow"}
LEGEND = "✓ accepted   " + "   ".join(f"[{colour}]{name}[/]" for name, colour in COLOURS.items())


def shown(token: int, decode: Decode) -> str:
    """One token's text on one line, its spaces visible."""
    text = decode([token])
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def step_view(number: int, root: int | None, step: RecordedStep, decode: Decode) -> Tree:
    """One step as a tree.

    Args:
        number: of the step, from 0 on; 0 is the prompt's.
        root: the known token; None: a prompt.
    """
    head = Text(f"step {number}  ", style="dim")
    head.append("the prompt" if root is None else shown(root, decode), style="bold")
    nodes, accepted = len(step.tokens), len(step.path)
    told = f"{accepted} of {nodes} nodes accepted" if nodes else "nothing drafted"
    head.append(f"  {told}, then ", style="dim").append(shown(step.said[-1], decode), style="bold")
    view = Tree(head, guide_style="dim")
    branches = [view]
    for i, token in enumerate(step.tokens):
        taken = i + 1 in step.path
        label = Text("✓ " if taken else "  ", style="bold green")
        colour = COLOURS[step.sources[i]]
        label.append(shown(token, decode), style=f"bold {colour}" if taken else f"dim {colour}")
        if step.probabilities:
            label.append(f"  {step.probabilities[i]:.2f}", style="dim")
        branches.append(branches[step.parents[i]].add(label))
    return view


def views(steps: Sequence[RecordedStep], decode: Decode) -> Iterator[Tree]:
    """All steps, each with the token that was known when it began."""
    known: int | None = None
    for number, step in enumerate(steps):
        yield step_view(number, known, step, decode)
        known = step.said[-1]


def summary(steps: Sequence[RecordedStep]) -> str:
    """One line: steps, tokens, acceptance length, accepted tokens by source."""
    drafted = [step for step in steps if step.tokens]
    tokens = sum(len(step.said) for step in steps)
    if not drafted:
        return f"{tokens} tokens in {len(steps)} steps; nothing was drafted."
    accepted = sum(len(step.path) for step in drafted)
    by_source = {name: 0 for name in COLOURS}
    for step in drafted:
        for node in step.path:
            by_source[step.sources[node - 1]] += 1
    parts = ", ".join(f"{count} {name}" for name, count in by_source.items())
    return (
        f"{tokens} tokens in {len(steps)} steps, the prompt's among them; acceptance length "
        f"{1 + accepted / len(drafted):.2f}, accepted from {parts}."
    )


def everything(
    steps: Sequence[RecordedStep], decode: Decode, most: int | None = None
) -> Group:
    """The legend, the first ``most`` steps (None: all) and the summary of all."""
    return Group(Text.from_markup(LEGEND), *list(views(steps, decode))[:most], summary(steps))


def svg(content: Any, title: str, width: int = 80) -> str:
    """As an SVG that loads nothing: a viewer's own monospaced font stands in for rich's."""
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False
    )
    console.print(content)
    # A fixed id: the same steps are the same file.
    text = console.export_svg(title=title, unique_id="steps")
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)
    return re.sub(r"font-family: Fira Code, *monospace", f"font-family: {FONTS}", text)
