# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the draft and of the trees from it, one per number of requests.

A draft is dozens of small kernels, which cost more to launch than to run; a graph launches them at
once. With tensor parallelism every rank has such graphs of its own draft, and the first rank's
trees are sent outside of them, on purpose (``first_rank``): gloo sends through the host, which no
capture allows; NCCL can be captured, but ranks that ever replayed different graphs would then wait
for each other for ever, and one launch is all that it would save. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.v2.request_graphs import RequestGraphs
from vllm_redrafter.engine.v2.tree_store import Drafted
from vllm_redrafter.tree.tree import Tree, mask_words

# (context [B, H], known tokens, request slots, nodes per request, [B] int64 each) -> trees.
DraftTrees = Callable[[Tensor, Tensor, Tensor, Tensor], Drafted]


class DraftBuffers:
    """What every graph of a draft reads and writes, for R requests.

    Args:
        slots: R.
        nodes: N.
        hidden_size: H.
        dtype: of the target's hidden states.
        device: where.
    """

    def __init__(
        self, slots: int, nodes: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        columns = nodes + 1
        self.context = torch.zeros(slots, hidden_size, dtype=dtype, device=device)
        self.known, self.slots, self.counts, self.num_nodes = torch.zeros(
            4, slots, dtype=torch.int64, device=device
        )
        self.tokens, self.parents, self.depths, self.sources = torch.zeros(
            4, slots, columns, dtype=torch.int64, device=device
        )
        words = mask_words(columns)
        self.masks = torch.zeros(slots, columns, words, dtype=torch.int64, device=device)

    def run(self, draft: DraftTrees, requests: int) -> None:
        """Draft for the first requests: from buffers, to buffers."""
        given = (self.context, self.known, self.slots, self.counts)
        tree, masks, sources = draft(*(part[:requests] for part in given))
        for name in ("tokens", "parents", "depths", "num_nodes"):
            getattr(self, name)[:requests].copy_(getattr(tree, name))
        self.masks[:requests].copy_(masks)
        self.sources[:requests].copy_(sources)

    def result(self, requests: int) -> Drafted:
        """What is valid until the next draft."""
        tree = Tree(
            tokens=self.tokens[:requests],
            parents=self.parents[:requests],
            depths=self.depths[:requests],
            num_nodes=self.num_nodes[:requests],
        )
        return Drafted(tree, self.masks[:requests], self.sources[:requests])


class DraftGraphs(RequestGraphs):
    """Drafts by graph where one was captured, else by ``draft`` itself.

    Args:
        vllm_config: vLLM's.
        device: where.
        draft: allocates nothing that outlives it and reads nothing back.
        buffers: for vLLM's ``max_num_seqs`` requests.
    """

    def __init__(
        self, vllm_config: Any, device: torch.device, draft: DraftTrees, buffers: DraftBuffers
    ) -> None:
        def run(requests: int) -> None:
            self.buffers.run(draft, requests)

        super().__init__(vllm_config, device, run, "Capturing ReDrafter's draft")
        self.draft = draft
        self.buffers = buffers

    def __call__(self, context: Tensor, known: Tensor, slots: Tensor, counts: Tensor) -> Drafted:
        """As ``draft``; a result is overwritten by the next call.

        Args:
            context: ``[B, H]``.
            known: ``[B]`` int64.
            slots: ``[B]`` integers.
            counts: ``[B]`` int64.
        """
        requests = known.shape[0]
        desc = self.find(requests)
        if desc is None:
            return self.draft(context, known, slots, counts)
        # Requests that fill up the graph's number keep what earlier ones left: nobody looks.
        self.buffers.context[:requests].copy_(context)
        self.buffers.known[:requests].copy_(known)
        self.buffers.slots[:requests].copy_(slots)
        self.buffers.counts[:requests].copy_(counts)
        self.run_fullgraph(desc)
        return self.buffers.result(requests)
