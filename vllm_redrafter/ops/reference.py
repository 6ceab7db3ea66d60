# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch twins of the compiled operators: slow, obvious, and what the operators mean.

Arguments are documented at the operators themselves, in the module of the same name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import log_probabilities, top_k_lowest_index
from vllm_redrafter.ops.kv_layout import offsets as map_offsets
from vllm_redrafter.tree.walk import NO_NODE, walk_one

MASK_WORD_BITS = 64

# Integers of as many bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
    softcap: float,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Twin of ``vllm_redrafter.ops.tree_attention``; in float64 the tests' reference."""
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    for r in range(request_index.numel()):
        start, rows, context = int(row_start[r]), int(row_count[r]), int(context_lens[r])
        if rows == 0:
            continue
        blocks = block_table[int(request_index[r])]
        keys = gather_tokens(key_cache, key_map, blocks, context + rows).to(compute_dtype)
        values = gather_tokens(value_cache, value_map, blocks, context + rows).to(compute_dtype)
        keys = keys.repeat_interleave(heads // kv_heads, dim=1)
        values = values.repeat_interleave(heads // kv_heads, dim=1)

        row_query = query[start : start + rows].to(compute_dtype)
        scores = torch.einsum("ihd,jhd->hij", row_query, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        sees = torch.ones(rows, context + rows, dtype=torch.bool, device=query.device)
        sees[:, context:] = unpack_bits(masks[start : start + rows], rows)
        scores = scores.masked_fill(~sees, -torch.inf)
        # A row that sees nothing has no softmax: its result is 0.
        weights = torch.softmax(scores, dim=-1).where(sees.any(-1)[:, None], 0)
        # Weights of hidden rows are 0, but 0 * inf would be NaN: hidden values must not be read.
        weighted = weights[..., None] * values.permute(1, 0, 2)[:, None]
        result = weighted.where(sees[None, ..., None], 0).sum(2)
        out[start : start + rows] = result.permute(1, 0, 2).to(out.dtype)


def gather_tokens(cache: Tensor, cache_map: Tensor | None, blocks: Tensor, count: int) -> Tensor:
    """The first ``count`` tokens of a request, ``[count, kv_heads, head_dim]``, through the map."""
    _, heads, block_size, head_dim = cache.shape
    used = blocks[: -(-count // block_size)].long()
    if cache_map is None:
        return cache[used].transpose(1, 2).flatten(0, 1)[:count]
    offsets = map_offsets(cache_map, block_size, head_dim)
    regions = cache[used].reshape(used.numel(), heads, block_size * head_dim)
    tokens = regions[:, :, offsets]  # [blocks, heads, block_size, head_dim]
    return tokens.transpose(1, 2).flatten(0, 1)[:count]


def unpack_bits(masks: Tensor, count: int) -> Tensor:
    """``[rows, words]`` int64 to ``[rows, count]`` bool, bit j % 64 of word j // 64."""
    column = torch.arange(count, device=masks.device)
    return (masks[:, column // MASK_WORD_BITS] >> (column % MASK_WORD_BITS) & 1).bool()


def move_kv(
    key_caches: list[Tensor],
    value_caches: list[Tensor],
    key_map: Tensor | None,
    value_map: Tensor | None,
    src_slots: Tensor,
    dst_slots: Tensor,
) -> None:
    """Twin of ``vllm_redrafter.ops.move_kv``."""
    for caches, cache_map in ((key_caches, key_map), (value_caches, value_map)):
        for cache in caches:
            blocks, heads, block_size, head_dim = cache.shape
            made = (src_slots >= 0) & (dst_slots >= 0)
            if cache.is_cuda:  # on the CPU a slot behind the last one is an error
                made &= (src_slots < blocks * block_size) & (dst_slots < blocks * block_size)
            src, dst = src_slots[made], dst_slots[made]
            bits = cache.view(_BITS[cache.element_size()])  # float8 cannot be indexed everywhere
            if cache_map is None:
                rows = bits[src // block_size, :, src % block_size]
                bits[dst // block_size, :, dst % block_size] = rows
                continue
            offsets = map_offsets(cache_map, block_size, head_dim)
            # [blocks, heads, region]: a view, so that writing to it writes to the cache.
            regions = bits.as_strided(
                (blocks, heads, block_size * head_dim), (cache.stride(0), cache.stride(1), 1)
            )
            src_block, src_offset = src // block_size, offsets[src % block_size]
            dst_block, dst_offset = dst // block_size, offsets[dst % block_size]
            head = torch.arange(heads)[None, :, None]
            rows = regions[src_block[:, None, None], head, src_offset[:, None, :]]
            regions[dst_block[:, None, None], head, dst_offset[:, None, :]] = rows


def walk(
    path: Tensor,
    num_accepted: Tensor,
    last_node: Tensor,
    next_token: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    target_tokens: Tensor,
) -> None:
    """Twin of ``vllm_redrafter.ops.walk``: ``vllm_redrafter.tree.walk.walk_one`` per request."""
    path.fill_(NO_NODE)
    for b, count in enumerate(num_nodes.tolist()):
        count = max(count, 1)
        targets = target_tokens[b, :count].tolist()
        nodes = walk_one(tokens[b, :count].tolist(), parents[b, :count].tolist(), targets)
        nodes = nodes[: path.shape[1]]
        last = nodes[-1] if nodes else 0
        path[b, : len(nodes)] = torch.tensor(nodes, dtype=torch.int64)
        num_accepted[b], last_node[b], next_token[b] = len(nodes), last, targets[last]


def beam_step(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    out_state: Tensor | None,
    logits: Tensor,
    beam_scores: Tensor,
    state: Tensor | None,
    draft_vocab: Tensor | None,
    top_k: int,
) -> None:
    """Twin of ``vllm_redrafter.ops.beam_step``: a step of ``drafter.beam_search.beam_search``."""
    batch, rows, vocab = logits.shape
    width = beam_scores.shape[1]
    candidates = beam_scores[:, :, None] + log_probabilities(logits, top_k).expand(batch, width, -1)
    best, flat = top_k_lowest_index(candidates.flatten(1), width)
    parent, row = flat // vocab, flat % vocab
    tokens.copy_(row if draft_vocab is None else draft_vocab[row])
    parents.copy_(parent)
    scores.copy_(best)
    if out_state is not None and state is not None:
        at = parent if rows == width else torch.zeros_like(parent)
        out_state.copy_(state.gather(1, at[:, :, None].expand_as(out_state)))
