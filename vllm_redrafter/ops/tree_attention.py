# SPDX-License-Identifier: Apache-2.0
"""Attention of tree rows over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.ops import reference
from vllm_redrafter.ops.library import compiled_available, has_kernel


def tree_attention(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_map: Tensor | None,
    value_map: Tensor | None,
    block_table: Tensor,
    request_index: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    context_lens: Tensor,
    masks: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> None:
    """Softmax attention where a row sees its request's context and the masked part of its tree.

    Covers R requests. Row i of request r is query row ``row_start[r] + i``; its key and value are
    in the cache already, at logical position ``context_lens[r] + i``. It sees positions
    ``0 .. context_lens[r] - 1`` and those rows j of its own request whose bit is set in its mask
    (a chain is the lower triangle). Products are summed in float32. A row that sees nothing gets
    zeros. Rows of ``out`` that no request covers are left as they are.

    Args:
        out: ``[T, query_heads, head_dim]``, written; any strides.
        query: ``[T, query_heads, head_dim]`` float32, bfloat16 or float16; any strides.
            ``query_heads`` is a multiple of ``kv_heads``, ``head_dim`` of 16.
        key_cache: ``[blocks, kv_heads, block_size, head_dim]``, dtype of query. Without a map any
            strides. With one, any in the first two dimensions, and the last two are not indexed
            by shape: a (block, head) region is ``block_size * head_dim`` consecutive elements, in
            the order of ``key_map``.
        value_cache: the same with ``value_map``.
        key_map: None, or on the CPU int32 ``[block_size * head_dim]``: feature d of token t of a
            block lies at offset ``key_map[t * head_dim + d]`` of its region. Token-minor,
            token-major and vLLM's AMX orders are quick, any other works. May carry the tag of
            ``ops.kv_layout.tag``.
        value_map: the same for values.
        block_table: int32 ``[requests, max_blocks]``, block numbers by logical position.
        request_index: int32 ``[R]``, row of ``block_table``.
        row_start: int32 ``[R]``, first query row.
        row_count: int32 ``[R]``, query rows, at most 64 times the mask words.
        context_lens: int32 ``[R]``, tokens before the first row; may be 0.
        masks: int64 ``[T, words]``, bit j % 64 of word j // 64 for row j of the same request.
        scale: factor on the scores.
        softcap: 0 for off, else scores become ``softcap * tanh(score / softcap)``.
        window: 0 for off, else a row sees only the last so many of the keys that it would see,
            its own included. For a row of a tree these are the keys at positions greater than its
            own less ``window``, where a row's position is ``context_lens`` plus its depth. Blocks
            in front of every row's window are not read.
        sinks: None, or float32 ``[query_heads]``: logits that enter the softmax's sum as one more
            key without a value; neither scaled nor capped. A row that sees nothing still gets
            zeros.

    On CUDA nothing is read back: a block number outside the cache is a key that nobody sees, and
    counts that exceed the tensors are cut. There, with bfloat16 or float16, a value that is not
    finite in one node reaches the other nodes of its request; elsewhere only those that see it.

    Raises:
        RuntimeError: arguments that do not fit each other (compiled operator).
    """
    if has_kernel(query.device):
        operator = torch.ops.redrafter.tree_attention.default
    else:
        operator = reference.tree_attention
    operator(
        out, query, key_cache, value_cache, key_map, value_map, block_table, request_index,
        row_start, row_count, context_lens, masks, scale, softcap, window, sinks,
    )  # fmt: skip


if compiled_available():

    @torch.library.register_fake("redrafter::tree_attention")
    def _(out: Tensor, query: Tensor, *rest: object) -> None:
        """Nothing to compute: the only result is written into ``out``."""
        torch._check(out.shape == query.shape, lambda: "out must have the shape of query.")
