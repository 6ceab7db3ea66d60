# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter eval`: what a drafter is worth on recorded answers of its target."""

import argparse
import os

from vllm_redrafter.cli import UserError
from vllm_redrafter.cli.fields import add_fields, read_fields
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.options import EvalOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = (
        "Nothing is generated: the target computes hidden states of the answers once, and vLLM's "
        "steps are replayed on them."
    )
    add_fields(parser, EvalOptions)


def run(args: argparse.Namespace) -> int:
    """Evaluate and say what came out; returns the exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never wait for a hub
    try:
        options = read_fields(args, EvalOptions)
        return _evaluate(options)
    except TrainingError as error:
        raise UserError(str(error)) from error


def _evaluate(options: EvalOptions) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from vllm_redrafter.training.evaluate import evaluate
    from vllm_redrafter.training.target import quiet_transformers

    quiet_transformers()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=None)
        report = evaluate(
            options, lambda done, total: bar.update(task, completed=done, total=total)
        )
    for warning in report["warnings"]:
        console.print(f"warning: {warning}")
    predicted = {entry["setting"]: entry["speed_up"] for entry in report["predictions"]}
    for setting, result in report["groups"][0]["settings"].items():
        text = f"W,L,N {setting}: acceptance length {result['acceptance_length']:.3f}"
        if report["lookup_tokens"]:
            parts = result["accepted_by_source"].items()
            text += f" (accepted: {', '.join(f'{n} from {name}' for name, n in parts)})"
        if setting in predicted:
            text += f", predicted speed-up {predicted[setting]:.2f}"
        console.print(text)
    console.print(report["recommendation"]["why"])
    console.print(f"wrote {options.out}/report.md")
    return 0
