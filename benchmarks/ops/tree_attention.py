# SPDX-License-Identifier: Apache-2.0
"""tree_attention against vLLM's own CPU attention on the same paged cache, in one run.

vLLM's kernel has no tree mask, so both compute causal rows (a chain is a tree). A step is one call
per layer on caches of their own; "cold" steps come after a sweep over other memory that throws the
caches out of L2 and L3, as a model's weights do. The two kernels take turns, step by step; printed
are medians, and the ratio of medians.

    python benchmarks/ops/tree_attention.py [--json FILE] [--threads N] [--steps N] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_redrafter.ops import compiled_available, isa, why_not
from vllm_redrafter.ops.kv_layout import tag
from vllm_redrafter.ops.tree_attention import tree_attention

BLOCK = 128

# name, requests, rows, context, query heads, KV heads, head_dim, layers
SHAPES = [
    ("SmolLM2-135M, 8 rows x 200", 1, 8, 200, 9, 3, 64, 30),
    ("SmolLM2-135M, 12 rows x 200", 1, 12, 200, 9, 3, 64, 30),
    ("SmolLM2-135M, 8 rows x 200, batch 8", 8, 8, 200, 9, 3, 64, 30),
    ("SmolLM2-135M, 16 rows x 2000", 1, 16, 2000, 9, 3, 64, 8),
    ("SmolLM2-135M, 16 rows x 2000, batch 8", 8, 16, 2000, 9, 3, 64, 2),
    ("Llama-8B, 16 rows x 2000", 1, 16, 2000, 32, 8, 128, 4),
    ("Llama-8B, 64 rows x 500", 1, 64, 500, 32, 8, 128, 4),
]


class Case:
    """Caches, queries and metadata of one shape, for both kernels."""

    def __init__(
        self, dtype: torch.dtype, requests: int, rows: int, context: int, heads: int,
        kv_heads: int, head_dim: int, layers: int,
    ) -> None:  # fmt: skip
        self.scale = head_dim**-0.5
        keys = context + rows
        per_request = -(-keys // BLOCK)
        blocks = requests * per_request + 1
        self.layout = _get_attn_isa(dtype, BLOCK, head_dim)
        self.table = (torch.randperm(blocks - 1) + 1)[: requests * per_request]
        self.table = self.table.view(requests, per_request).to(torch.int32)
        slots = (self.table.long()[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)[:, :keys]
        self.caches = []
        for _ in range(layers):
            cache = torch.zeros(blocks, kv_heads, 2 * BLOCK, head_dim, dtype=dtype)
            key, value = cache.chunk(2, dim=2)
            fresh = torch.randn(2, slots.numel(), kv_heads, head_dim).to(dtype)
            vllm_ops.cpu_attn_reshape_and_cache(
                fresh[0], fresh[1], key, value, slots.flatten(), self.layout
            )
            self.caches.append((key, value))
        token, feature = torch.arange(BLOCK)[:, None], torch.arange(head_dim)
        if self.layout == "amx":
            group = token // 16 * 16 * head_dim
            key_map = group + feature // 2 * 32 + token % 16 * 2 + feature % 2
            group = feature // 16 * 16 * BLOCK
            value_map = group + token // 2 * 32 + feature % 16 * 2 + token % 2
        else:
            key_map, value_map = feature * BLOCK + token, token * head_dim + feature
        self.key_map = tag(key_map.flatten(), BLOCK, head_dim)
        self.value_map = tag(value_map.flatten(), BLOCK, head_dim)

        total = requests * rows
        self.query = torch.randn(total, heads, head_dim).to(dtype)
        self.out = torch.empty_like(self.query)
        self.vllm_out = torch.empty_like(self.query)
        self.index = torch.arange(requests, dtype=torch.int32)
        self.start = torch.arange(requests + 1, dtype=torch.int32) * rows
        self.count = torch.full((requests,), rows, dtype=torch.int32)
        self.context = torch.full((requests,), context, dtype=torch.int32)
        self.lens = self.context + self.count
        chain = torch.tensor([(1 << (i + 1)) - 1 if i < 63 else -1 for i in range(rows)])
        self.masks = chain.repeat(requests)[:, None].contiguous()
        self.metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=requests, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            seq_lens=self.lens, dtype=dtype, query_start_loc=self.start, causal=True,
            sliding_window_size=-1, isa=self.layout, enable_kv_split=True,
        )  # fmt: skip

    def ours(self) -> None:
        for key, value in self.caches:
            tree_attention(
                self.out, self.query, key, value, self.key_map, self.value_map, self.table,
                self.index, self.start[:-1], self.count, self.context, self.masks, self.scale,
            )  # fmt: skip

    def vllm(self) -> None:
        for key, value in self.caches:
            vllm_ops.cpu_attention_with_kv_cache(
                query=self.query, key_cache=key, value_cache=value, output=self.vllm_out,
                query_start_loc=self.start, seq_lens=self.lens, scale=self.scale, causal=True,
                alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0.0,
                scheduler_metadata=self.metadata, s_aux=None,
            )  # fmt: skip


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there too")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    args = parser.parse_args()
    if not compiled_available():
        raise SystemExit(why_not())
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    other = torch.zeros(16 << 20)  # 64 MiB

    results = []
    print(
        f"{platform.processor() or platform.machine()}, {isa()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':42}{'dtype':>9}{'':>6}{'ours':>10}{'vLLM':>10}{'ratio':>7}"
        f"{'min ours':>9}{'vLLM':>8}{'ratio':>7}  us per layer"
    )
    for name, *shape in SHAPES:
        if args.only not in name:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            case = Case(dtype, *shape)
            case.ours(), case.vllm()
            torch.testing.assert_close(case.out, case.vllm_out, atol=2e-2, rtol=2e-2)
            for temperature in ("warm", "cold"):
                times: dict[str, list[float]] = {"ours": [], "vllm": []}
                for _ in range(args.steps):
                    for kernel in times:
                        if temperature == "cold":
                            other.add_(1)
                        times[kernel].append(timed(getattr(case, kernel)))
                layers = shape[-1]
                median = {k: statistics.median(v) / layers * 1e6 for k, v in times.items()}
                best = {k: min(v) / layers * 1e6 for k, v in times.items()}
                row = {
                    "shape": name, "dtype": str(dtype).removeprefix("torch."),
                    "temperature": temperature, "layers": layers, "us_per_layer": median,
                    "min_us_per_layer": best, "ratio": median["ours"] / median["vllm"],
                }  # fmt: skip
                results.append(row)
                print(
                    f"{name:42}{row['dtype']:>9}{temperature:>6}{median['ours']:10.1f}"
                    f"{median['vllm']:10.1f}{row['ratio']:7.2f}{best['ours']:9.1f}"
                    f"{best['vllm']:8.1f}{best['ours'] / best['vllm']:7.2f}"
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"isa": isa(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                 "steps": args.steps, "results": results}, file, indent=1,
            )  # fmt: skip


if __name__ == "__main__":
    main()
