# SPDX-License-Identifier: Apache-2.0
"""What a step of the target and a draft cost on one machine, as a file and as functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_redrafter.reading import parse_json, shown

FORMAT = 1

# A draft's beam width and length; (0, 0) is none.
DraftShape = tuple[int, int]
NO_DRAFT: DraftShape = (0, 0)


class CostTableError(ValueError):
    """A file that is no cost table, or one of another machine or model; the message says which."""


@dataclass(frozen=True)
class CostTable:
    """Measured seconds.

    Attributes:
        identity: what it was measured on: machine, model, dtype, threads, versions.
        rows: ascending (rows, seconds of one pass of the target over them without attention, with
            the logits of all).
        drafts: by W and L, ascending (requests, seconds of one draft).
        attention: seconds that one row takes to attend to one token of context, all layers.
    """

    identity: Mapping[str, str]
    rows: tuple[tuple[float, float], ...]
    drafts: Mapping[DraftShape, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    attention: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "identity": dict(self.identity),
            "rows_seconds": [list(point) for point in self.rows],
            "draft_seconds": {
                f"{width},{length}": [list(point) for point in points]
                for (width, length), points in self.drafts.items()
            },
            "attention_seconds": self.attention,
        }

    @classmethod
    def from_json(cls, value: Any) -> CostTable:
        """Raises CostTableError for anything that ``to_json`` does not give."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {shown(value['format'])} is not {FORMAT}")
            identity = {str(key): str(item) for key, item in value["identity"].items()}
            drafts = {
                _shape(name): _points(points) for name, points in value["draft_seconds"].items()
            }
            rows, attention = _points(value["rows_seconds"]), float(value["attention_seconds"])
            if not (math.isfinite(attention) and attention >= 0):
                raise ValueError(f"attention_seconds is {attention}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CostTableError(f"it is no cost table ({error!r})") from error
        return cls(identity, rows, drafts, attention)


def _points(value: Any) -> tuple[tuple[float, float], ...]:
    points = tuple((float(at), float(seconds)) for at, seconds in value)
    ascending = all(a[0] < b[0] for a, b in zip(points, points[1:], strict=False))
    if not points or not ascending or points[0][0] <= 0:
        raise ValueError(f"{shown(value)} does not rise from above 0")
    if not all(math.isfinite(seconds) and seconds > 0 for _, seconds in points):
        raise ValueError(f"{shown(value)} holds a time that is none")
    return points


def _shape(name: str) -> DraftShape:
    width, length = (int(part) for part in name.split(","))
    return width, length


def read_table(path: Path, identity: Mapping[str, str]) -> CostTable:
    """The table of a file.

    Args:
        identity: of this engine.

    Raises:
        CostTableError: unreadable, no cost table, or of something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CostTableError(f"it cannot be read ({error})") from error
    table = CostTable.from_json(value)
    other = [name for name, mine in identity.items() if table.identity.get(name) != mine]
    if other:
        name = other[0]
        raise CostTableError(
            f"it was measured with {name} {table.identity.get(name)!r}, and this is "
            f"{identity[name]!r}"
        )
    return table


def between(points: Sequence[tuple[float, float]], at: np.ndarray | float) -> np.ndarray:
    """Straight lines between points; behind the last the line of the last two goes on.

    Args:
        points: ascending, at least one.
        at: any shape.
    """
    xs = np.array([x for x, _ in points])
    ys = np.array([y for _, y in points])
    inside = np.interp(at, xs, ys)
    # Rows never come for nothing: where noise says so, the line from the origin goes on.
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else 0.0
    slope = slope if slope > 0 else ys[-1] / xs[-1]
    return inside + slope * np.maximum(np.asarray(at) - xs[-1], 0)


def convex(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points below which no other lies: their lower convex hull, never falling.

    A pass of few rows waits for memory, one of many computes, so that each further row takes as
    long as the last one or longer. Whatever lies above the hull is noise: other programs make a
    pass longer, never shorter. A cost that is too high would never be corrected, since steps of
    that size would not be made; one that is too low is, by the steps that it leads to.

    Args:
        points: ascending.
    """
    out: list[tuple[float, float]] = []
    for point in points:
        while len(out) > 1 and _slope(out[-2], out[-1]) >= _slope(out[-2], point):
            out.pop()
        if len(out) == 1 and point[1] <= out[0][1]:
            out[0] = (out[0][0], point[1])  # fewer rows take no longer
        out.append(point)
    return tuple(out)


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
