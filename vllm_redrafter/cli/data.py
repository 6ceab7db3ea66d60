# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter data`: prompts and the target's own answers as a dataset to train on."""

import argparse
import os
from collections import Counter

from vllm_redrafter.cli import UserError
from vllm_redrafter.cli.fields import add_fields, read_fields
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.options import DataOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = (
        "Without --hidden-states `vllm-redrafter train` computes them again, which costs one pass "
        "of the target over the text and saves thousands of bytes per token. Interrupt at any "
        "time: the same command goes on with the shards that are missing."
    )
    add_fields(parser, DataOptions)


def run(args: argparse.Namespace) -> int:
    """Make the data and say what is in it; returns the exit code."""
    try:
        options = read_fields(args, DataOptions)
        if not options.hf_dataset:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local: never wait for a hub
        return _generate(options)
    except TrainingError as error:
        raise UserError(str(error)) from error


def _generate(options: DataOptions) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from vllm_redrafter.training.data import generate_dataset

    console = Console(highlight=False, markup=False, soft_wrap=True)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), Remaining(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting engines", total=None)

        def show(done: int, total: int, dropped: Counter) -> None:
            text = f"{sum(dropped.values())} dropped"
            bar.update(task, completed=done, total=total, description=text)
            if not console.is_terminal:
                console.print(f"{done} of {total} prompts, {text}")

        manifest = generate_dataset(options, progress=show, say=console.print)
    totals = manifest["totals"]
    console.print(
        f"wrote {options.out}: {totals['sequences']} answers, {totals['answer_tokens']} answer "
        f"tokens in {len(manifest['shards'])} shards"
    )
    for reason, count in totals["dropped"].items():
        console.print(f"dropped {count}: {reason}")
    if manifest["source"].get("skipped_lines"):
        console.print(f"skipped {manifest['source']['skipped_lines']} broken lines")
    console.print(
        f"next: vllm-redrafter train --target {options.target} --data {options.out} --out DRAFTER"
    )
    return 0
