# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch twins of the compiled operators: slow, obvious, and what the operators mean.

Arguments are documented at the operators themselves, in the module of the same name.
"""

from __future__ import annotations

from collections.abc import Callable

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
    window: int = 0,
    sinks: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Twin of ``vllm_redrafter.ops.tree_attention``; in float64 the tests' reference."""
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    for r in range(request_index.numel()):
        start, rows, context = int(row_start[r]), int(row_count[r]), int(context_lens[r])
        if rows == 0:
            continue
        blocks = block_table[int(request_index[r])]
        sees = torch.ones(rows, context + rows, dtype=torch.bool, device=query.device)
        sees[:, context:] = unpack_bits(masks[start : start + rows], rows)
        first = 0
        if window:
            sees = last_seen(sees, context, window)
            # What no row's window holds may be in a block of another request, or of none.
            first = int(sees.any(0).int().argmax())
            sees = sees[:, first:]
        tokens = blocks, context + rows, first
        keys = gather_tokens(key_cache, key_map, *tokens).to(compute_dtype)
        values = gather_tokens(value_cache, value_map, *tokens).to(compute_dtype)
        keys = keys.repeat_interleave(heads // kv_heads, dim=1)
        values = values.repeat_interleave(heads // kv_heads, dim=1)

        row_query = query[start : start + rows].to(compute_dtype)
        scores = torch.einsum("ihd,jhd->hij", row_query, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~sees, -torch.inf)
        if sinks is not None:
            column = sinks.to(compute_dtype)[:, None, None].expand(-1, rows, 1)
            scores = torch.cat([scores, column], dim=-1)
        # A row that sees nothing has no softmax: its result is 0.
        weights = torch.softmax(scores, dim=-1).where(sees.any(-1)[:, None], 0)
        if sinks is not None:
            weights = weights[..., :-1]
        # Weights of hidden rows are 0, but 0 * inf would be NaN: hidden values must not be read.
        weighted = weights[..., None] * values.permute(1, 0, 2)[:, None]
        result = weighted.where(sees[None, ..., None], 0).sum(2)
        out[start : start + rows] = result.permute(1, 0, 2).to(out.dtype)


def last_seen(sees: Tensor, context: int, window: int) -> Tensor:
    """Of the keys that each row sees, bool ``[rows, keys]``, the last ``window``.

    A row that its own mask leaves out counts as one of them all the same.
    """
    still_to_come = sees.int().flip(-1).cumsum(-1).flip(-1)
    hidden = ~sees[:, context:].any(-1, keepdim=True)
    return sees & (still_to_come + hidden.int() <= window)


def gather_tokens(
    cache: Tensor, cache_map: Tensor | None, blocks: Tensor, end: int, first: int = 0
) -> Tensor:
    """Tokens ``first`` to ``end`` of a request, ``[n, kv_heads, head_dim]``, through the map."""
    _, heads, block_size, head_dim = cache.shape
    used = blocks[first // block_size : -(-end // block_size)].long()
    wanted = slice(first % block_size, first % block_size + end - first)
    if cache_map is None:
        return cache[used].transpose(1, 2).flatten(0, 1)[wanted]
    offsets = map_offsets(cache_map, block_size, head_dim)
    regions = cache[used].reshape(used.numel(), heads, block_size * head_dim)
    tokens = regions[:, :, offsets]  # [blocks, heads, block_size, head_dim]
    return tokens.transpose(1, 2).flatten(0, 1)[wanted]


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
            regions, places = _regions(bits, cache_map)
            regions[places(dst)] = regions[places(src)]


def read_kv(cache: Tensor, cache_map: Tensor | None, slots: Tensor) -> Tensor:
    """``[slots, heads, head_dim]``, what lies at slots of a paged cache, as integers."""
    block_size = cache.shape[2]
    bits = cache.view(_BITS[cache.element_size()])
    if cache_map is None:
        return bits[slots // block_size, :, slots % block_size]
    regions, places = _regions(bits, cache_map)
    return regions[places(slots)]


def _regions(bits: Tensor, cache_map: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple]]:
    """``[blocks, heads, region]`` of a cache with a map, and the index of slots in it.

    The regions are a view: writing to them writes to the cache.
    """
    blocks, heads, block_size, head_dim = bits.shape
    offsets = map_offsets(cache_map, block_size, head_dim)
    head = torch.arange(heads)[None, :, None]
    regions = bits.as_strided(
        (blocks, heads, block_size * head_dim), (bits.stride(0), bits.stride(1), 1)
    )

    def places(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block, offset = slots // block_size, offsets[slots % block_size]
        return block[:, None, None], head, offset[:, None, :]

    return regions, places


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
