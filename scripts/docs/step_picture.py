# SPDX-License-Identifier: Apache-2.0
"""Draw docs/pictures/step.svg, one verification step as tree and mask, and show.svg.

python scripts/docs/step_picture.py

docs/pictures/steps.json holds the steps of an answer, as ``vllm-redrafter show --json`` wrote them;
docs/pictures/show.svg is what the command prints of the first of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import svg

from vllm_redrafter.demo import steps_view
from vllm_redrafter.engine.v1.recording import RecordedStep
from vllm_redrafter.tree.tree import Tree

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
STEPS = json.loads((PICTURES / "steps.json").read_text(encoding="utf-8"))
# The step that is drawn: it has nodes of the drafter and of the lookup, and takes a second branch.
NUMBER = 2

COLUMN, ROW, WIDTH, HEIGHT, CELL = 128, 42, 104, 30, 17
FILL = {"drafter": "#d9f0fb", "lookup": "#f6dcf5", "both": "#fbf0c4"}
ACCEPTED, OTHER = "stroke:#1a7f37;stroke-width:3", "stroke:#8a8f98;stroke-width:1"


def decode(ids: list[int]) -> str:
    """The text of one token."""
    return STEPS["texts"][str(ids[0])]


def page() -> str:
    """step.svg's text."""
    return draw(STEPS["steps"][NUMBER], STEPS["steps"][NUMBER - 1]["said"][-1])


def terminal() -> str:
    """show.svg's text."""
    steps = [RecordedStep(**step) for step in STEPS["steps"]]
    return steps_view.svg(steps_view.everything(steps, decode, 4), "vllm-redrafter show --steps 4")


def draw(step: dict[str, Any], root: int) -> str:
    """One step.

    Args:
        step: a ``RecordedStep`` as a dictionary.
        root: the known token.
    """
    parents = [-1, *step["parents"]]
    tree = Tree.from_lists([[0] * len(parents)], [parents])
    depths = tree.depths[0].tolist()
    lines = _lines(parents)
    left, top = 16, 64
    at = {i: (left + COLUMN * depths[i], top + ROW * lines[i]) for i in range(len(parents))}
    on_path = {0, *step["path"]}
    shapes = [svg.text(left, 28, "One step: drafted nodes, and what the target accepts", 15,
                       "font-weight:bold", "start")]  # fmt: skip
    for i, parent in enumerate(parents):
        if i:
            (x1, y1), (x2, y2) = at[parent], at[i]
            style = ACCEPTED if i in on_path else OTHER
            middle = HEIGHT / 2
            shapes.append(svg.curve(x1 + WIDTH, y1 + middle, x2, y2 + middle, style))
    for i, (x, y) in at.items():
        source = step["sources"][i - 1] if i else None
        fill = FILL[source] if source else "#e8e8e8"
        shapes.append(svg.box(x, y, WIDTH, HEIGHT, f"fill:{fill};"
                              + (ACCEPTED if i in on_path else OTHER)))  # fmt: skip
        label = steps_view.shown(step["tokens"][i - 1] if i else root, decode)
        shapes.append(svg.text(x + 6, y + 20, str(i), 10, "fill:#666", "start"))
        shapes.append(svg.text(x + WIDTH / 2 + 5, y + 20, label))
        if i:
            shapes.append(svg.text(x + WIDTH, y - 3, f"{step['probabilities'][i - 1]:.2f}", 10,
                                   "fill:#666", "end"))  # fmt: skip
    x, y = at[step["path"][-1] if step["path"] else 0]
    says = f"→ {steps_view.shown(step['said'][-1], decode)}"
    shapes.append(svg.text(x + WIDTH + 8, y + 20, says, 13, "fill:#1a7f37;font-weight:bold",
                           "start"))  # fmt: skip

    right = left + COLUMN * (max(depths) + 1) + 60
    size = len(parents)
    shapes += _mask(right, top, tree, on_path)
    bottom = max(top + ROW * (max(lines) + 1), top + 40 + CELL * size) + 8
    shapes += _legend(left, bottom + 8)
    return svg.page(right + 70 + CELL * size + 16, bottom + 34, "One verification step", shapes)


def _lines(parents: list[int]) -> list[int]:
    """The line of each node: a first child stands beside its parent, others below."""
    lines = [0] * len(parents)
    children: dict[int, list[int]] = {i: [] for i in range(len(parents))}
    for i, parent in enumerate(parents[1:], start=1):
        children[parent].append(i)
    used = 0

    def place(node: int) -> None:
        nonlocal used
        for number, child in enumerate(children[node]):
            if number:
                used += 1
            lines[child] = used
            place(child)

    place(0)
    return lines


def _mask(left: float, top: float, tree: Tree, on_path: set[int]) -> list[str]:
    sees = tree.ancestor_mask()[0].tolist()
    size = len(sees)
    shapes = [
        svg.text(left, top - 8, "Who attends to whom (row sees column)", 12, "", "start"),
        svg.box(left + 24, top + 24, 40, CELL * size, "fill:#c9d3e0", radius=2),
        svg.text(left + 44, top + 18, "text", 10, "fill:#666"),
    ]
    for i, row in enumerate(sees):
        y = top + 24 + CELL * i
        shapes.append(svg.text(left + 18, y + 12, str(i), 10, "fill:#666", "end"))
        shapes.append(svg.text(left + 70 + CELL * i + CELL / 2, top + 18, str(i), 10, "fill:#666"))
        for j, seen in enumerate(row):
            fill = "#f4f4f4" if not seen else "#1a7f37" if {i, j} <= on_path else "#7d93ad"
            cell = CELL - 1
            shapes.append(
                svg.box(left + 70 + CELL * j, y, cell, cell, f"fill:{fill}", radius=1)
            )
    return shapes


def _legend(left: float, y: float) -> list[str]:
    shapes, x = [], left
    for name, fill in FILL.items():
        shapes.append(svg.box(x, y, 14, 14, f"fill:{fill};{OTHER}", radius=2))
        shapes.append(svg.text(x + 20, y + 12, name, 12, "", "start"))
        x += 100
    shapes.append(svg.box(x, y, 14, 14, f"fill:#fff;{ACCEPTED}", radius=2))
    shapes.append(svg.text(x + 22, y + 12, "accepted; the number is a path's probability", 12, "",
                           "start"))  # fmt: skip
    return shapes


if __name__ == "__main__":
    (PICTURES / "step.svg").write_text(page(), encoding="utf-8")
    (PICTURES / "show.svg").write_text(terminal(), encoding="utf-8")
