# SPDX-License-Identifier: Apache-2.0
"""move_kv and build_tree: what one step pays for them, compiled and as twins.

    python benchmarks/ops/small_ops.py [--json FILE] [--steps N]

"cold" calls come after a sweep over 64 MiB of other memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.ops import compiled_available, isa, reference, why_not
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.tree.build import build_tree as twin_build_tree


def vector_maps(block_size: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    token, feature = torch.arange(block_size)[:, None], torch.arange(head_dim)
    return (
        (feature * block_size + token).flatten().int(),
        (token * head_dim + feature).flatten().int(),
    )


def move_cases() -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    cases = {}
    for name, requests, layers, heads, dim in [
        ("move_kv, SmolLM2-135M, batch 1", 1, 30, 3, 64),
        ("move_kv, SmolLM2-135M, batch 8", 8, 30, 3, 64),
        ("move_kv, Llama-8B, batch 1", 1, 32, 8, 128),
    ]:
        maps = vector_maps(128, dim)
        caches = [
            torch.randn(2 * requests, heads, 256, dim).bfloat16().chunk(2, dim=2)
            for _ in range(layers)
        ]
        keys, values = [key for key, _ in caches], [value for _, value in caches]
        # Every request accepts nodes 1, 4 and 7: two rows move.
        base = torch.arange(requests)[:, None] * 256 + 40
        src, dst = (base + torch.tensor([4, 7])).flatten(), (base + torch.tensor([2, 3])).flatten()
        mover = MoveKV(keys, values, *maps)
        cases[name] = (
            lambda mover=mover, src=src, dst=dst: mover(src, dst),
            lambda k=keys, v=values, m=maps, src=src, dst=dst: reference.move_kv(
                k, v, *m, src, dst
            ),
        )
    return cases


def tree_cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    cases = {}
    for batch, length, width, nodes in [(1, 3, 4, 11), (8, 3, 4, 11), (1, 4, 16, 63)]:
        shape = (batch, length, width)
        scores = (torch.rand(shape).sort(dim=-1, descending=True).values * -3).cumsum(1)
        beams = Beams(
            torch.zeros(batch, dtype=torch.int64),
            torch.randint(8192, shape),
            torch.arange(width).expand(shape) // 2,
            scores.sort(dim=-1, descending=True).values,
        )
        for rule in ("best", "beams"):
            cases[f"build_tree {rule}, W={width} L={length}, {nodes} nodes, batch {batch}"] = (
                lambda b=beams, r=rule, n=nodes: build_tree(b, r, n),
                lambda b=beams, r=rule, n=nodes: twin_build_tree(b, r, n).packed_mask(),
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there too")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if not compiled_available():
        raise SystemExit(why_not())
    torch.manual_seed(0)
    other = torch.zeros(16 << 20)
    results = []
    print(f"{isa()}, {torch.get_num_threads()} threads; us per call, median (minimum)")
    for name, (ours, twin) in {**move_cases(), **tree_cases()}.items():
        ours(), twin()
        row: dict[str, object] = {"case": name}
        for kind, function in (("warm", ours), ("cold", ours), ("twin", twin)):
            times = []
            for _ in range(args.steps):
                if kind == "cold":
                    other.add_(1)
                start = time.perf_counter()
                function()
                times.append((time.perf_counter() - start) * 1e6)
            row[kind] = {"median_us": statistics.median(times), "min_us": min(times)}
        results.append(row)
        cells = [f"{k} {row[k]['median_us']:8.1f} ({row[k]['min_us']:7.1f})"
                 for k in ("warm", "cold", "twin")]  # fmt: skip
        print(f"{name:50}", "  ".join(cells))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"isa": isa(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                       "steps": args.steps, "results": results}, file, indent=1)  # fmt: skip


if __name__ == "__main__":
    main()
