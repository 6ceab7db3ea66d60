# SPDX-License-Identifier: Apache-2.0
"""tree_attention on a GPU against xformers, a kernel that shares no line and no author with ours.

Nothing in xformers takes a tensor bias and a paged cache in one call (nor one tree per request in
its own ``tree_attention``), so K and V are gathered and every request is a call with its own bias.
"""

from __future__ import annotations

import math

import pytest
import torch
from paged_cases import attention_case, by_strides

from vllm_redrafter.ops import reference


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (128, 4)])
def test_against_xformers(dtype, head_dim, group):
    fmha = pytest.importorskip("xformers.ops.fmha")
    torch.manual_seed(head_dim)
    case = by_strides(
        attention_case(
            dtype, [0, 37, 700, 2000], [5, 1, 16, 64], head_dim=head_dim, kv_heads=2, group=group,
            block_size=16,
        )
    )  # fmt: skip
    case = case.but(**{k: v.cuda() for k, v in vars(case).items() if torch.is_tensor(v)})
    out = torch.zeros_like(case.query)
    torch.ops.redrafter.tree_attention(out, *case.args())
    for r, (start, rows, context) in enumerate(
        zip(case.row_start.tolist(), case.row_count.tolist(), case.context_lens.tolist(),
            strict=True)
    ):  # fmt: skip
        keys = context + rows
        blocks = case.block_table[int(case.request_index[r])]
        key, value = (
            reference.gather_tokens(cache, None, blocks, keys).view(1, keys, 2, head_dim)
            .repeat_interleave(group, 2)
            for cache in (case.key_cache, case.value_cache)
        )  # fmt: skip
        words = case.masks[start : start + rows, :, None].cpu()
        sees = (words >> torch.arange(64) & 1).flatten(1)[:, :rows].bool()
        visible = torch.ones(rows, -(-keys // 8) * 8, dtype=torch.bool)  # rows must be aligned
        visible[:, context:keys] = sees
        bias = torch.zeros(visible.shape).masked_fill(~visible, -math.inf).to(case.query)
        wanted = fmha.memory_efficient_attention_forward(
            case.query[start : start + rows][None].contiguous(), key.contiguous(),
            value.contiguous(), scale=case.scale,
            attn_bias=bias[:, :keys].expand(1, 2 * group, -1, -1),
        )[0]  # fmt: skip
        # Both round weights and results to 16 bits, at different places.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out[start : start + rows], wanted, atol=4 * eps, rtol=2 * eps)
