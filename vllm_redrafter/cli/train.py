# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter train`: a drafter from the target's own answers."""

import argparse
import os
from typing import Any

from vllm_redrafter.cli import UserError
from vllm_redrafter.cli.fields import add_fields, read_fields
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.options import TrainOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = (
        "Several GPUs: torchrun --nproc-per-node N -m vllm_redrafter.cli train ... "
        "The drafter in --out can be served at once; log, checkpoint and curves are in "
        "--out/training."
    )
    add_fields(parser, TrainOptions)


def run(args: argparse.Namespace) -> int:
    """Train and say what came out; returns the exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never wait for a hub
    try:
        options = read_fields(args, TrainOptions)
        return _train(options)
    except TrainingError as error:
        raise UserError(str(error)) from error


def _train(options: TrainOptions) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from vllm_redrafter.training.log import can_plot
    from vllm_redrafter.training.target import quiet_transformers
    from vllm_redrafter.training.train import train

    quiet_transformers()
    # Of several processes the first one speaks.
    console = Console(
        quiet=os.environ.get("RANK", "0") != "0", highlight=False, markup=False, soft_wrap=True
    )
    if options.plot and not can_plot():
        console.print("no curves.png: it needs `matplotlib` (pip install 'vllm-redrafter[train]')")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), Remaining(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading the target", total=None)

        def show(done: int, total: int, line: dict[str, Any]) -> None:
            bar.update(task, completed=done, total=total, description=_figures(line))
            if not console.is_terminal or "eval_loss" in line:
                console.print(f"step {done} of {total}: {_figures(line)}")

        result = train(options, show)
    console.print(f"wrote {result.out} after {result.steps} steps")
    console.print(f"draft vocabulary: {result.coverage:.1%} of the answers' tokens can be drafted")
    if result.picture:
        console.print(f"curves: {result.picture}")
    console.print(
        "serve it: vllm serve "
        f"{options.target} --speculative-config "
        f'\'{{"method": "redrafter", "model": "{result.out}"}}\''
    )
    return 0


def _figures(line: dict[str, Any]) -> str:
    parts = []
    for prefix, name in (("", ""), ("eval_", "held out ")):
        if f"{prefix}loss" in line:
            top1 = " ".join(f"{value:.3f}" for value in line[f"{prefix}top1"])
            parts.append(f"{name}loss {line[f'{prefix}loss']:.3f}, first guess right {top1}")
    return "; ".join(parts)
