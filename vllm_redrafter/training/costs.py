# SPDX-License-Identifier: Apache-2.0
"""Times of one machine that were measured elsewhere, and the speed that they predict.

They come from `vllm-redrafter calibrate`, or were written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_redrafter.budget.costs import CostTable, CostTableError, between
from vllm_redrafter.reading import one_line, parse_json, shown
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.replay import Counts, Setting


@dataclass(frozen=True)
class Costs:
    """Measured milliseconds of one machine.

    Attributes:
        plain: a step without drafting.
        draft: one draft, by (W, L); a float counts for all.
        rows: ascending (rows, one pass of the target over so many rows with all that is not draft).
    """

    plain: float
    draft: float | dict[tuple[int, int], float]
    rows: tuple[tuple[float, float], ...]

    def draft_ms(self, setting: Setting) -> float:
        """Raises TrainingError when the file has no time for the setting's W and L."""
        if isinstance(self.draft, float):
            return self.draft
        key = (setting.beam_width, setting.draft_length)
        if key not in self.draft:
            raise TrainingError(
                f"--costs has no draft_ms for '{key[0]},{key[1]}', which the setting {setting} "
                "needs; add it, or leave the setting out."
            )
        return self.draft[key]

    def rows_ms(self, rows: float) -> float:
        """Between measured sizes on a straight line; outside them nothing is known.

        Raises:
            TrainingError: fewer or more rows than were measured.
        """
        lowest, highest = self.rows[0][0], self.rows[-1][0]
        if not lowest <= rows <= highest:
            raise TrainingError(
                f"--costs has rows_ms for {lowest:g} to {highest:g} rows, but {rows:.2f} are "
                "needed (the root and the drafted nodes); measure that size too."
            )
        before = self.rows[0]
        for after in self.rows:
            if rows <= after[0]:
                break
            before = after
        if after[0] == before[0]:
            return after[1]
        part = (rows - before[0]) / (after[0] - before[0])
        return before[1] + part * (after[1] - before[1])

    def by_nodes(self, setting: Setting) -> tuple[np.ndarray, float]:
        """``[N + 1]`` milliseconds of a step with 0 to N nodes, and those of the draft.

        Raises:
            TrainingError: the file has no time for one of them.
        """
        steps = [self.rows_ms(1 + nodes) for nodes in range(setting.num_nodes + 1)]
        return np.array(steps), self.draft_ms(setting)

    def speed_up(self, setting: Setting, counts: Counts) -> tuple[float, float]:
        """Milliseconds per step, and tokens per second against plain decoding (prefill apart)."""
        if counts.milliseconds:
            step = counts.milliseconds / counts.drafts
        else:
            step = self.rows_ms(1 + counts.nodes / counts.drafts) + self.draft_ms(setting)
        return step, counts.acceptance_length * self.plain / step


def read_costs(path: str | Path) -> Costs:
    """The file of ``--costs``.

    Raises:
        TrainingError: unreadable, or not of the form that ``--help`` shows.
    """
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"--costs {path} cannot be read ({one_line(error)}).") from error
    if isinstance(value, dict) and "format" in value:
        return _of_table(value, path)
    try:
        plain = _milliseconds(value["plain_ms"])
        draft = value["draft_ms"]
        if isinstance(draft, dict):
            draft = {_pair(key): _milliseconds(one, zero=True) for key, one in draft.items()}
        else:
            draft = _milliseconds(draft, zero=True)
        rows = sorted((float(int(key)), _milliseconds(v)) for key, v in value["rows_ms"].items())
        if not rows:
            raise ValueError("rows_ms is empty")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else one_line(error)
        raise TrainingError(
            f"--costs {path} is not of the form that --help shows ({what}): give plain_ms, "
            "draft_ms and rows_ms in milliseconds."
        ) from error
    return Costs(plain, draft, tuple(rows))


def _of_table(value: Any, path: str | Path) -> Costs:
    """Of a file of `vllm-redrafter calibrate`: one request, attention to its context left out."""
    try:
        table = CostTable.from_json(value)
    except CostTableError as error:
        raise TrainingError(f"--costs {path}: {error}") from error
    drafts = {shape: 1e3 * float(between(points, 1)) for shape, points in table.drafts.items()}
    most = max(2, round(table.rows[-1][0]))
    rows = tuple((float(n), 1e3 * float(between(table.rows, n))) for n in range(1, most + 1))
    return Costs(rows[0][1], drafts, rows)


def _milliseconds(value: Any, zero: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value > 0 or (zero and value == 0)) or math.isinf(value):
        raise ValueError(f"{shown(value)} is not a time")
    return float(value)


def _pair(key: str) -> tuple[int, int]:
    width, length = key.split(",")
    return int(width), int(length)


def recommend(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The setting with the best predicted speed-up; none without predictions or above 1.

    Returns:
        ``{"setting": "W,L,N" or None, "why": one sentence}``.
    """
    if not predictions:
        return {
            "setting": None,
            "why": "No setting is recommended, because no costs were given: more nodes accept "
            "more and make a step dearer, and only times of your machine can weigh that (--costs).",
        }
    best = max(predictions, key=lambda entry: entry["speed_up"])
    if best["speed_up"] <= 1:
        return {
            "setting": None,
            "why": "No setting is recommended, because none is predicted to be faster than "
            f"plain decoding (best: {best['setting']}, {best['speed_up']:.2f} times its speed).",
        }
    return {
        "setting": best["setting"],
        "why": f"Recommended is {best['setting']}, the best prediction: {best['speed_up']:.2f} "
        "times the speed of plain decoding, by the costs that were given.",
    }
