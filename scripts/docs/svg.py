# SPDX-License-Identifier: Apache-2.0
"""A few shapes of SVG, enough for the pictures of the docs."""

from __future__ import annotations

from html import escape

FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def text(
    x: float, y: float, what: str, size: int = 13, style: str = "", anchor: str = "middle"
) -> str:
    """One line, its baseline at ``y``."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
        f'xml:space="preserve" style="{style}">{escape(what)}</text>'
    )


def box(x: float, y: float, width: float, height: float, style: str, radius: int = 6) -> str:
    """A rectangle with round corners."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
        f'style="{style}"/>'
    )


def curve(x1: float, y1: float, x2: float, y2: float, style: str, upright: bool = False) -> str:
    """From one point to another, leaving and arriving level, or upright."""
    if upright:
        middle = (y1 + y2) / 2
        bend = f"{x1:g} {middle:g}, {x2:g} {middle:g}"
    else:
        middle = (x1 + x2) / 2
        bend = f"{middle:g} {y1:g}, {middle:g} {y2:g}"
    return f'<path d="M {x1:g} {y1:g} C {bend}, {x2:g} {y2:g}" style="fill:none;{style}"/>'


def page(width: float, height: float, title: str, shapes: list[str]) -> str:
    """A whole file: white ground, so that it is read on dark pages too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'font-family="{FONT}">'
    )
    ground = box(0, 0, width, height, "fill:#fff", radius=8)
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *shapes, "</svg>"]) + "\n"
