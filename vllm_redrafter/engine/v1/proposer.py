# SPDX-License-Identifier: Apache-2.0
"""From hidden states and known tokens to the trees of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.target_tables import target_tables
from vllm_redrafter.engine.v1.request_tree import RequestTree
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.draft import CompiledDraft
from vllm_redrafter.options import ReDrafterOptions


class ReDrafterProposer:
    """What vLLM builds for ``method: custom_class``; our runner calls ``draft``."""

    def __init__(self, vllm_config: Any) -> None:
        self.options: ReDrafterOptions = options_of(vllm_config)
        self._draft: Any = None

    def load_model(self, target: torch.nn.Module) -> None:
        """Load the drafter and bind it to the loaded target's tables."""
        options = self.options
        embedding, lm_head = target_tables(target)
        drafter = load_drafter(options.model, embedding=embedding, lm_head=lm_head)
        self._draft = CompiledDraft(
            drafter,
            beam_width=options.beam_width,
            draft_length=options.draft_length,
            top_k=options.top_k,
            take_weights=True,
        )

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM demands this name; its arguments lack the hidden states, so it drafts nothing."""
        raise RuntimeError("ReDrafter drafts through its own runner; this call is a bug.")

    def draft(self, context: Tensor, tokens: Sequence[int]) -> Beams:
        """Draft for a batch.

        Args:
            context: ``[B, H]``, hidden states that predicted ``tokens``.
            tokens: B known tokens.
        """
        return self._draft(context, torch.tensor(tokens, dtype=torch.int64))

    def trees(self, beams: Beams) -> list[RequestTree]:
        """One tree per request, by the rule and node count of the options."""
        tree, masks = build_tree(beams, self.options.tree, self.options.num_speculative_tokens)
        return [
            RequestTree(tokens[1:count], parents[1:count], depths[1:count], mask[:count])
            for count, tokens, parents, depths, mask in zip(
                tree.num_nodes.tolist(),
                tree.tokens.tolist(),
                tree.parents.tolist(),
                tree.depths.numpy(),
                masks.numpy(),
                strict=True,
            )
        ]
