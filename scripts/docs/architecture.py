# SPDX-License-Identifier: Apache-2.0
"""Draw docs/pictures/architecture.svg from the imports of the code.

python scripts/docs/architecture.py

A room is a folder of ``vllm_redrafter`` (or a module beside them); it stands above all that it
imports, as high as it can. Arrows that follow from others are left out. A circle between rooms is
an error.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import svg

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_redrafter"
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"

# Leaves that everybody uses, and the package's own face: no arrows of interest.
LEFT_OUT = {"__init__", "reading", "cache", "plugin"}

WIDTH, HEIGHT, ACROSS, DOWN = 132, 36, 160, 66


def room_of(path: Path) -> str:
    """The room of a file: its first folder, and below ``engine`` the runner's too."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:2]) if parts[0] == "engine" and parts[1] in ("v1", "v2") else parts[0]


def arrows() -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        here = room_of(file)
        mine = found.setdefault(here, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                target = imported_room(name)
                if target and target != here:
                    mine.add(target)
    rooms = found.keys() - LEFT_OUT
    return {room: found[room] & rooms for room in sorted(rooms)}


def imported_room(name: str) -> str | None:
    """The room of an imported dotted name; None where it is not in this package."""
    parts = name.split(".")
    if parts[0] != "vllm_redrafter" or len(parts) < 2:
        return None
    path = PACKAGE.joinpath(*parts[1:])
    while path != PACKAGE:
        if path.is_dir():
            return room_of(path / "__init__")
        if path.with_suffix(".py").is_file():
            return room_of(path)
        path = path.parent
    return None


def rows(imports: dict[str, set[str]]) -> list[list[str]]:
    """The rooms from the top floor down; each stands right below the lowest that imports it.

    One that nobody imports stands right above what it imports.

    Raises:
        graphlib.CycleError: rooms import each other in a circle.
    """
    row: dict[str, int] = {}
    for room in reversed(list(TopologicalSorter(imports).static_order())):
        row[room] = 1 + max((row[r] for r, below in imports.items() if room in below), default=-1)
    imported = set().union(*imports.values())
    for room in imports.keys() - imported:
        row[room] = min((row[below] for below in imports[room]), default=1) - 1
    return [sorted(r for r in row if row[r] == at) for at in range(1 + max(row.values()))]


def reduced(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that follow from a way through other rooms."""
    reach: dict[str, set[str]] = {}
    for room in TopologicalSorter(imports).static_order():
        reach[room] = imports[room].union(*(reach[below] for below in imports[room]))
    return {
        room: {b for b in below if not any(b in reach[other] for other in below - {b})}
        for room, below in imports.items()
    }


def page() -> str:
    """The picture's text."""
    imports = arrows()
    levels = rows(imports)
    wide = max(map(len, levels))
    at = {
        room: (20 + ACROSS * (i + (wide - len(level)) / 2), 20 + DOWN * row)
        for row, level in enumerate(levels)
        for i, room in enumerate(level)
    }
    shapes = []
    for room, below in reduced(imports).items():
        for other in sorted(below):
            (x1, y1), (x2, y2) = at[room], at[other]
            shapes.append(
                svg.curve(x1 + WIDTH / 2, y1 + HEIGHT, x2 + WIDTH / 2, y2,
                          "stroke:#6b7a90;stroke-width:1.4", upright=True)
            )  # fmt: skip
    for room, (x, y) in at.items():
        fill = "#fbe6d4" if room.startswith("engine") else "#e4edf7"
        shapes.append(svg.box(x, y, WIDTH, HEIGHT, f"fill:{fill};stroke:#44546a"))
        shapes.append(svg.text(x + WIDTH / 2, y + 23, room))
    title = "Rooms of vllm_redrafter; a room imports what stands below it"
    return svg.page(40 + ACROSS * wide, 20 + DOWN * len(levels), title, shapes)


if __name__ == "__main__":
    PICTURE.write_text(page(), encoding="utf-8")
