# SPDX-License-Identifier: Apache-2.0
"""The compiled draft against its PyTorch twin and against the time to read its weights.

Default shape: a drafter for SmolLM2-135M (hidden and exit_dim 576, two blocks, recurrent cell,
8,192-row head, bfloat16), random weights. "cold" calls come after a sweep over 96 MiB of other
memory, which throws the weights out of the caches as a target's forward pass does; "warm" calls
follow each other.

The floor is measured, not computed: the bytes that the draft reads, summed by torch.sum with the
same threads, in the same order (once for every step, so that later steps may find them in L3) and
after the same sweep. A second floor charges every byte of every step to main memory, at the speed
of the sweep itself.

All variants take turns, round by round; printed are medians and minima in milliseconds.

    python benchmarks/ops/bench_draft.py [--json FILE] [--threads N] [--rounds N] [--top-k K]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops.draft import CompiledDraft
from vllm_redrafter.ops.library import compiled_available, isa, why_not

SWEEP_BYTES = 96 << 20


def make_drafter(args: argparse.Namespace) -> Drafter:
    torch.manual_seed(0)
    config = DrafterConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        exit_dim=args.exit_dim,
        num_draft_layers=args.blocks,
        rnn=True,
        draft_vocab_size=args.head_rows,
    )
    drafter = Drafter(config).requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.normal_(std=math.sqrt(2.0 / parameter.shape[-1]))
    drafter.to(getattr(torch, args.dtype))
    drafter.embedding = torch.randn(args.vocab, args.hidden).to(drafter.dtype)
    if args.head_rows != args.vocab:
        drafter.draft_vocab = torch.randperm(args.vocab)[: args.head_rows]
    return drafter.eval()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Floor:
    """Reads what a draft of ``length`` steps reads, and nothing else.

    The copies are made of the packed layers, so that a draft does not find them in a cache because
    the floor was measured just before it, nor the other way round.
    """

    def __init__(self, run: CompiledDraft, length: int) -> None:
        layers = [layer.clone().view(torch.float32) for layer in run._layers if layer.dim() == 4]
        rnn_w, rnn_u, context_half, *rest = layers
        self.steps = [[rnn_w, context_half, *rest]] + [[rnn_w, rnn_u, *rest]] * (length - 1)
        self.bytes = sum(layer.nbytes for step in self.steps for layer in step)

    def __call__(self) -> None:
        for step in self.steps:
            for layer in step:
                layer.sum()


def measure(args: argparse.Namespace) -> list[dict]:
    drafter = make_drafter(args)
    # Not zeros: untouched pages of zeros are all the same page, which never leaves the cache.
    sweep_over = torch.ones(SWEEP_BYTES // 4)

    def sweep() -> Tensor:
        return sweep_over.sum()

    results = []
    for batch in args.batch:
        settings = {
            "beam_width": args.beam_width, "draft_length": args.draft_length, "top_k": args.top_k,
        }  # fmt: skip
        context = torch.randn(batch, args.hidden).to(drafter.dtype)
        token = torch.randint(args.vocab, (batch,))
        run = CompiledDraft(drafter, **settings)
        floor = Floor(run, args.draft_length)
        times: dict[str, list[float]] = {
            name: [] for name in ("sweep", "floor", "cold", "warm", "twin cold", "twin warm")
        }

        def compiled(run=run, context=context, token=token):
            return run(context, token)

        def twin(context=context, token=token, settings=settings):
            return beam_search(drafter, context, token, **settings)

        for _ in range(3):
            compiled(), twin(), floor()
        for _ in range(args.rounds):
            times["sweep"].append(seconds(sweep))
            times["floor"].append(seconds(floor))
            sweep()
            times["cold"].append(seconds(compiled))
            times["warm"].append(seconds(compiled))
            sweep()
            times["twin cold"].append(seconds(twin))
            times["twin warm"].append(seconds(twin))
        median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        memory_rate = SWEEP_BYTES / (median["sweep"] * 1e-3)
        results.append(
            {
                "batch": batch,
                **settings,
                "median_ms": median,
                "min_ms": {name: min(values) * 1e3 for name, values in times.items()},
                "bytes": floor.bytes,
                "memory_gb_per_s": memory_rate / 1e9,
                "all_from_memory_ms": floor.bytes / memory_rate * 1e3,
                "cold_over_floor": median["cold"] / median["floor"],
                "cold_over_twin": median["cold"] / median["twin cold"],
            }
        )
    return results


def show(results: list[dict]) -> None:
    for r in results:
        print(
            f"\nbatch {r['batch']}, W {r['beam_width']}, L {r['draft_length']}, "
            f"top_k {r['top_k']}: reads {r['bytes'] / 1e6:.1f} MB; "
            f"memory gives {r['memory_gb_per_s']:.1f} GB/s"
        )
        for name, median in r["median_ms"].items():
            print(f"  {name:10s} median {median:8.3f} ms   min {r['min_ms'][name]:8.3f} ms")
        print(f"  all bytes of all steps from main memory: {r['all_from_memory_ms']:.3f} ms")
        print(
            f"  cold / floor {r['cold_over_floor']:.2f}   "
            f"cold / twin cold {r['cold_over_twin']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the results here")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch has it")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beam-width", type=int, default=4)
    parser.add_argument("--draft-length", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--exit-dim", type=int, default=576)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--head-rows", type=int, default=8192)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    if not compiled_available():
        parser.error(why_not())
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "dtype": args.dtype,
        "rounds": args.rounds,
    }
    print(machine)
    results = measure(args)
    show(results)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
