# SPDX-License-Identifier: Apache-2.0
"""What ReDrafter takes of a GPU's memory beside the drafter's weights, as a formula.

vLLM measures before it divides what is left into KV cache blocks: buffers are there by then, and
its profile run drafts for the largest batch and makes the logits of the widest step of trees. The
formula says beforehand what that will be, and tests compare it with what is allocated. What tree
attention takes is an upper bound and in no profile run: vLLM leaves attention out there.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.engine.v2.endings import MOST_STOP_TOKENS
from vllm_redrafter.lookup.sizes import MAX_CHAINS
from vllm_redrafter.options import ReDrafterOptions
from vllm_redrafter.tree.tree import mask_words

# csrc/cuda: logits of a block of beam_step's scan; query rows of a block of tree_attention.
SCAN_CHUNK = 512
ATTENTION_ROWS = 64

# What vLLM's sampler holds at once as float32 (spec_decode/rejection_sampler.py).
MAX_CHUNK_BYTES = 2**30

_MIB = 2**20


@dataclass(frozen=True)
class ExtraMemory:
    """Bytes.

    Attributes:
        buffers: held from start to end.
        draft: while drafting for the largest batch.
        logits: while sampling the widest step of trees: its logits, a float32 copy of as many as
            vLLM's sampler takes at once, and the hidden states behind them.
        attention: at most, while tree attention runs.
    """

    buffers: int
    draft: int
    logits: int
    attention: int

    @property
    def peak(self) -> int:
        """At most at one time: the last three come one after the other."""
        return self.buffers + max(self.draft, self.logits, self.attention)

    def __str__(self) -> str:
        parts = ("buffers", "draft", "logits", "attention")
        said = ", ".join(f"{name} {getattr(self, name) / _MIB:.1f}" for name in parts)
        return f"at most {self.peak / _MIB:.1f} MiB beside the drafter's weights ({said})"


def widest_step(options: ReDrafterOptions, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """The most rows, roots and nodes, that one step verifies."""
    return max(
        min(running, max_num_batched_tokens // rows) * rows
        for running, rows in enumerate(options.tree_rows(max_num_seqs), start=1)
    )


def extra_memory(
    options: ReDrafterOptions,
    drafter: DrafterConfig,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    vocab_size: int,
    drafter_bytes: int,
    target_bytes: int,
    head_dim: int,
    multiprocessors: int,
) -> ExtraMemory:
    """The bytes of ``ExtraMemory`` on CUDA, where the draft is the compiled one.

    Args:
        options: N, W, L, the top k, the lookup and the schedule.
        drafter: H, the width E behind the input projection, and V', the rows of its head.
        max_num_seqs, max_num_batched_tokens: vLLM's.
        vocab_size: V, the columns of the target's logits.
        drafter_bytes, target_bytes: of one element of the drafter's weights, of the target's.
        head_dim: of the target's attention.
        multiprocessors: of the GPU.
    """
    rows_seen = widest_step(options, max_num_seqs, max_num_batched_tokens)
    chunk = min(rows_seen, max(1, MAX_CHUNK_BYTES // (4 * vocab_size)))
    return ExtraMemory(
        buffers=_buffers(options, max_num_seqs, max_num_batched_tokens)
        + max_num_seqs * drafter.hidden_size * target_bytes,
        draft=draft_bytes(options, drafter, max_num_seqs, drafter_bytes)
        + max_num_seqs * drafter.hidden_size * target_bytes,
        logits=rows_seen * (vocab_size + drafter.hidden_size) * target_bytes
        + chunk * vocab_size * 4,
        # Pieces times requests, heads and tiles stay below 4 per multiprocessor, and a tile has
        # this many rows: a float32 row and two numbers for the merge each.
        attention=4 * multiprocessors * ATTENTION_ROWS * (head_dim + 2) * 4,
    )


def _buffers(options: ReDrafterOptions, slots: int, max_rows: int) -> int:
    nodes, depth = options.num_speculative_tokens, options.max_depth
    rows, words = nodes + 1, mask_words(nodes + 1)
    trees = slots * (rows * (3 + words) + 2) * 8 + rows * (words + 1) * 8
    # Stop tokens and the longest text, per request; lengths until vLLM's are there.
    trees += slots * ((MOST_STOP_TOKENS + 1) * 8 + 4)
    # Known token, slot, nodes asked for and found; tokens, parents, depths, sources and masks: for
    # graphs of the draft.
    draft = slots * (4 + rows * (4 + words)) * 8
    # Slots, ends and results per request, paths; tokens, draws, KV slots, emitted tokens per row.
    # For one KV cache group, which targets with one kind of layer have.
    accept = (slots * (6 + depth) + 1 + slots * rows * 4) * 8
    step = slots * (2 + 2 * len(set(options.tree_rows(slots)))) * 4 + max_rows * words * 8
    # By depth; nodes, moves, replaced trees, bad ones; nodes and accepted ones by source.
    stats = (1 + depth + 4 + 2 * 4) * 8
    positions = max_rows * 8
    # Of vLLM's class for draft models, which ours extends.
    vllm_inputs = max_rows * (4 + 8 + 1) + (3 * slots + 1) * 4
    vllm_requests = slots * (8 + 4 + 8 + 1) + slots * nodes * (8 + 4)
    return trees + draft + accept + step + stats + positions + vllm_inputs + vllm_requests


def draft_bytes(options: ReDrafterOptions, drafter: DrafterConfig, batch: int, element: int) -> int:
    """What one draft allocates on CUDA: ``ops.draft.CompiledDraft`` and the trees of it.

    Args:
        options: N, W, L, the top k and the lookup.
        drafter: the shapes.
        batch: B, requests.
        element: bytes of one element of the drafter's weights.
    """
    width, length = options.beam_width, options.draft_length
    hidden, exit_dim, vocab = drafter.hidden_size, drafter.exit_dim, drafter.draft_vocab_size
    rows = batch * (width if length > 1 else 1)
    split = drafter.has_input_proj or drafter.num_draft_layers > 0
    per_row = (5 if drafter.rnn else 2) * hidden + (2 if split else 1) * exit_dim + vocab
    per_request = hidden + (exit_dim if split else 0)
    activations = element * (rows * per_row + batch * per_request) + batch * width * 4
    # One more than the top k tells whether a tie goes on behind them.
    kept = max(width, min(options.top_k + 1, vocab) if options.top_k else 0)
    selection = rows * -(-vocab // SCAN_CHUNK) * (kept + 1) * 8
    beams = batch * length * width * (8 + 8 + 4)
    return beams + max(activations + selection, _trees_bytes(options, batch))


def _trees_bytes(options: ReDrafterOptions, batch: int) -> int:
    """What is made of the beams: trees, and before them the lookup's chains and all candidates."""
    nodes = options.num_speculative_tokens
    columns = nodes + 1
    trees = (columns * (3 + mask_words(columns)) + 1) * 8
    # Sources of the nodes, and how many nodes are asked for.
    trees += (columns + 1) * 8
    if not options.prompt_lookup:
        return batch * trees
    depth = min(options.prompt_lookup_num_tokens, nodes)
    chains = MAX_CHAINS * (depth * (8 + 4) + 8) + 3 * 4
    candidates = nodes * (4 * 8 + 4) + 8
    return batch * (trees + columns * 8 + chains + candidates)
