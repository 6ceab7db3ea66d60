# SPDX-License-Identifier: Apache-2.0
"""tree_attention against vLLM's own CPU attention on the same paged cache.

vLLM's kernel has no tree mask, so both compute causal rows (a chain is a tree). A step is one call
per layer on caches of their own. 16 rows x 2000 and the Llama shapes have fewer layers than their
models, which changes nothing: each layer's cache is larger than what is kept of the others'.
"""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_redrafter.ops.kv_layout import tag
from vllm_redrafter.ops.tree_attention import tree_attention

BLOCK = 128

# requests, rows, context, query heads, KV heads, head_dim, layers
SHAPES = {
    "8x200": (1, 8, 200, 9, 3, 64, 30),
    "8x200_batch8": (8, 8, 200, 9, 3, 64, 30),
    "16x2000": (1, 16, 2000, 9, 3, 64, 8),
    "16x2000_batch8": (8, 16, 2000, 9, 3, 64, 2),
    "llama8b_16x2000": (1, 16, 2000, 32, 8, 128, 4),
    "llama8b_64x500": (1, 64, 500, 32, 8, 128, 4),
}


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
        self.row_start = self.start[:-1]
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
                self.index, self.row_start, self.count, self.context, self.masks, self.scale,
            )  # fmt: skip

    def vllm(self) -> None:
        for key, value in self.caches:
            vllm_ops.cpu_attention_with_kv_cache(
                query=self.query, key_cache=key, value_cache=value, output=self.vllm_out,
                query_start_loc=self.start, seq_lens=self.lens, scale=self.scale, causal=True,
                alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0.0,
                scheduler_metadata=self.metadata, s_aux=None,
            )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_tree_attention(compare, threads, shape, cold):
    torch.manual_seed(0)
    case = Case(torch.bfloat16, *SHAPES[shape])
    case.ours(), case.vllm()
    torch.testing.assert_close(case.out, case.vllm_out, atol=2e-2, rtol=2e-2)
    targets = {"vllm": 1.5} if shape == "16x2000" else {"ms": 0.5} if shape == "8x200" else {}
    compare(case.ours, {"vllm": case.vllm}, targets, cold, layers=SHAPES[shape][-1])


@pytest.mark.parametrize("shape", ["8x200", "16x2000"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_batch_of_8_against_one(compare, threads, shape, cold):
    """Eight requests must cost at most eight times one."""
    torch.manual_seed(0)
    one = Case(torch.bfloat16, *SHAPES[shape][:-1], layers=2)
    eight = Case(torch.bfloat16, 8, *SHAPES[shape][1:-1], layers=2)
    compare(eight.ours, {"one": one.ours}, {"one": 8.0}, cold, layers=2)
