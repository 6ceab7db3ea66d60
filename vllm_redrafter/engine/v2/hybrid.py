# SPDX-License-Identifier: Apache-2.0
"""Trees of the drafter's beams and of a request's own text, of fixed size and without a read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.engine.v2.tree_store import Drafted
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.ops.candidates import choose_tree, merge_candidates
from vllm_redrafter.ops.suffix_lookup import suffix_lookup
from vllm_redrafter.tree.tree import Tree, mask_words


class TextLookup:
    """The suffix lookup in the token ids that vLLM keeps on the device for every request.

    vLLM has written what a step said before it asks for the next draft, and writes the whole text
    again, outputs too, where a preempted request comes back. A prompt that is read in pieces is
    there as a whole from the start; its request drafts nothing before it has said a token.

    vLLM keeps the ids in host memory that is mapped into the device, but for its own n-gram
    drafts: it does not want to give 4 bytes per request slot and position of the device's memory.
    So the search reads over the bus, from the end of a text on to the 32nd earlier occurrence of
    its last token, each token at most once a step. Computed, not measured: 2 us for all of 32,000
    tokens at 64 GB/s, and the bus's latency once for every piece that the kernel reads.

    Args:
        req_states: vLLM's ``RequestState``. Its tensors stay where they are, so that a CUDA graph
            can read them.
        depth: how far a continuation is followed.

    Attributes:
        starts: ``[R]`` int32, where each slot's tokens begin; the speculator puts the model
            state's here. Before that, in vLLM's profile run, nobody has a text.
    """

    def __init__(self, req_states: Any, depth: int) -> None:
        self.text: Tensor = req_states.all_token_ids.gpu
        self.lengths: Tensor = req_states.total_len.gpu
        self.starts = torch.zeros_like(self.lengths)
        self.depth = depth

    def __call__(self, slots: Tensor) -> Chains:
        """``slots``: ``[B]`` int64, request slots."""
        starts, ends = self.starts[slots], self.lengths[slots]
        return suffix_lookup(self.text, slots.int(), starts, ends, depth=self.depth)


def hybrid_trees(beams: Beams, chains: Chains, nodes: int, counts: Tensor) -> Drafted:
    """The likeliest paths of both sources.

    Args:
        beams: the drafter's, of B requests.
        chains: the lookup's.
        nodes: N; trees have N + 1 columns.
        counts: ``[B]`` int64, nodes that each request may have; at most N.
    """
    candidates = merge_candidates(beams.root, beams, chains, nodes)
    tree, masks, chosen = choose_tree(candidates, counts)
    # Roots and padding take some candidate's; nobody looks.
    sources = candidates.sources.gather(1, chosen.clamp_(min=0))
    return Drafted(tree, masks, sources)


def first_nodes(drafted: Drafted, nodes: int, counts: Tensor) -> Drafted:
    """The first nodes of wider trees, which are trees too: parents come first.

    Args:
        drafted: trees of more than N + 1 columns.
        nodes: N.
        counts: ``[B]`` int64, nodes that each request may have; at most N.
    """
    tree, columns = drafted.tree, nodes + 1
    first = Tree(
        tokens=tree.tokens[:, :columns],
        parents=tree.parents[:, :columns],
        depths=tree.depths[:, :columns],
        num_nodes=tree.num_nodes.minimum(counts + 1),
    )
    masks = drafted.masks[:, :columns, : mask_words(columns)]
    return Drafted(first, masks, drafted.sources[:, :columns])
