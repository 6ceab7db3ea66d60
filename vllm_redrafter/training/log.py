# SPDX-License-Identifier: Apache-2.0
"""The record of a run: JSON lines, TensorBoard if asked for, and a picture at the end."""

from __future__ import annotations

import importlib.util
import json
from itertools import chain
from pathlib import Path
from typing import Any

from vllm_redrafter.reading import parse_json
from vllm_redrafter.training.errors import missing

LOG = "log.jsonl"


class Log:
    """Appends one JSON object a line.

    Args:
        directory: where ``log.jsonl`` lies.
        last_step: lines of later steps are cut off: they will be written again.
        tensorboard: also write event files.
    """

    def __init__(self, directory: Path, last_step: int, tensorboard: bool = False) -> None:
        self._path = directory / LOG
        kept = [line for line in read_log(directory) if line["step"] <= last_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise missing("tensorboard", "--tensorboard", extra=False) from error
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=last_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Append ``line``, which has "step", numbers, and lists of numbers by depth."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, list):
                    for depth, one in enumerate(value, start=1):
                        self._board.add_scalar(f"{name}/{depth}", one, line["step"])
                elif name != "step":
                    self._board.add_scalar(name, value, line["step"])


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines so far, up to one that is none: a crash may have cut it off."""
    path = directory / LOG
    lines = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = parse_json(text.decode("utf-8"))
        except ValueError:
            break
        if not _is_line(line):
            break
        lines.append(line)
    return lines


def _is_line(value: Any) -> bool:
    """Whether it is what ``Log.write`` gets, as far as it is ever read."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    losses = [value[key] for key in ("loss", "eval_loss") if key in value]
    shares = [value[key] for key in ("top1", "eval_top1") if key in value]
    if not all(isinstance(one, list) for one in shares):
        return False
    return all(type(one) in (int, float) for one in chain(losses, *shares))


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(directory: Path) -> Path:
    """Draw losses and the accuracy at every depth over the steps: ``curves.png``."""
    from matplotlib.figure import Figure

    lines = read_log(directory)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        shown = [line for line in lines if key in line]
        if shown:
            left.plot([s["step"] for s in shown], [s[key] for s in shown], label=label)
    left.set(xlabel="step", ylabel="cross-entropy per draft position", title="loss")
    key = "eval_top1" if any("eval_top1" in line for line in lines) else "top1"
    shown = [line for line in lines if key in line]
    for depth in range(len(shown[0][key]) if shown else 0):
        deep = [s for s in shown if depth < len(s[key])]
        right.plot([s["step"] for s in deep], [s[key][depth] for s in deep],
                   label=f"draft position {depth + 1}")  # fmt: skip
    title = "first guess right, " + ("held out" if key == "eval_top1" else "training")
    right.set(xlabel="step", ylabel="share", ylim=(0, 1), title=title)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path = directory / "curves.png"
    figure.savefig(path, dpi=120)
    return path
