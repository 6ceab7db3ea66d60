# SPDX-License-Identifier: Apache-2.0
"""Which tree pays: plain vLLM, chains and trees of several fixed sizes on the same prompts.

Every setting is an engine in a process of its own and all take turns (see
``vllm_redrafter.bench.compare``). Needs about 1.5 GB of memory per setting and a quiet machine:

    python benchmarks/tree_sizes.py --batch-size 1 --json benchmarks/results/tree_sizes_batch1.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.compare import Comparison, compare
from vllm_redrafter.bench.engine_process import SpecCounters
from vllm_redrafter.bench.engines import Settings
from vllm_redrafter.bench.variants import BUNDLED_DRAFTER
from vllm_redrafter.demo.prompts import chat_token_ids, mt_bench, spread
from vllm_redrafter.demo.target import smollm2

PLAIN = "plain vLLM"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["1,3,3", "4,2,5", "4,3,7", "4,3,11", "8,3,15"],
        metavar="W,L,N",
        help="beam width, draft length, nodes (default %(default)s)",
    )
    parser.add_argument("--tree", default="best", choices=("best", "beams"))
    parser.add_argument("--lookup", action=argparse.BooleanOptionalAction, default=True,
                        help="continuations from the text compete in the tree best")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    variants: dict[str, dict | None] = {PLAIN: None}
    for setting in args.settings:
        width, length, nodes = map(int, setting.split(","))
        variants[setting] = {
            "method": "redrafter",
            "model": str(BUNDLED_DRAFTER),
            "beam_width": width,
            "draft_length": length,
            "num_speculative_tokens": nodes,
            "tree": args.tree,
            "prompt_lookup": args.lookup and args.tree == "best",
            "node_budget": "fixed",
        }
    target = smollm2()
    settings = Settings(
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        max_model_len=1024,
        kv_cache_bytes=256 << 20,
    )
    questions = spread(mt_bench(), args.prompts)
    result = compare(target, variants, chat_token_ids(questions, target), settings)
    print(table(result))
    categories = {}
    if args.batch_size == 1:
        categories = by_category(result, [question.category for question in questions])
        print("\n" + category_table(categories))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # Paths of the machine that measured say nothing to a reader.
        result.target = Path(result.target).name
        openmp = result.machine.get("openmp") or {}
        if openmp.get("LD_PRELOAD"):
            openmp["LD_PRELOAD"] = Path(openmp["LD_PRELOAD"]).name
        for config in result.variants.values():
            if config:
                config["model"] = Path(config["model"]).name
        # Single runs, with all their tokens, are many times as long as what they say.
        data = {name: value for name, value in result.to_json().items() if name != "runs"}
        data["by_category"] = categories
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def table(result: Comparison) -> str:
    """Markdown, one row per setting; the ratio's spread is its quartiles over prompt pairs."""
    lines = [
        "| W, L, N | tokens/s | ratio (median; quartiles) | acceptance length | ms per step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in result.variants:
        summary = result.summary(name)
        ratio = "1"
        if name != result.baseline:
            r = result.ratio(name)
            ratio = f"{r.overall:.2f} ({r.median:.2f}; {r.low:.2f} to {r.high:.2f})"
        length = f"{summary.acceptance_length:.2f}" if summary.acceptance_length else "1"
        lines.append(
            f"| {name} | {summary.tokens_per_second:.1f} | {ratio} | {length} | "
            f"{summary.ms_per_step:.1f} |"
        )
    return "\n".join(lines)


def by_category(result: Comparison, categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per category the number of prompts, and each setting's ratio to plain vLLM and acceptance.

    Args:
        categories: of every prompt; at batch size 1 a prompt is a group of its own.
    """
    found: dict[str, dict[str, Any]] = {}
    for category in dict.fromkeys(categories):
        groups = {i for i, name in enumerate(categories) if name == category}
        found[category] = {"prompts": len(groups)}
        for name in result.variants:
            if name == result.baseline:
                continue
            spec = sum(
                (run.result.spec for run in result.of(name) if run.group in groups), SpecCounters()
            )
            length = 1 + spec.accepted / spec.drafts if spec.drafts else 1.0
            ratio = result.ratio(name, groups).overall
            found[category][name] = {"ratio": ratio, "acceptance_length": length}
    return found


def category_table(found: dict[str, dict[str, Any]]) -> str:
    """`by_category` as Markdown, one row per category."""
    names = [name for name in next(iter(found.values())) if name != "prompts"]
    lines = [
        f"| ratio, acceptance length | prompts | {' | '.join(names)} |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for category, row in found.items():
        cells = [f"{row[n]['ratio']:.2f}, {row[n]['acceptance_length']:.2f}" for n in names]
        lines.append(f"| {category} | {row['prompts']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
