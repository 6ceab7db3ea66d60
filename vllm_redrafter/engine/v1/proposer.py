# SPDX-License-Identifier: Apache-2.0
"""The drafter, as vLLM builds it for Model Runner V1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import load_config
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.target_check import check_tables
from vllm_redrafter.engine.target_tables import target_tables
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
        config = load_config(options.model)
        # Also looked at where only the fingerprint is compared with it.
        head = config.shared_head or config.target is not None
        embedding, lm_head = target_tables(target, head=head)
        drafter = load_drafter(options.model, embedding=embedding, lm_head=lm_head)
        check_tables(drafter.config.target, options, embedding, lm_head)
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

    def draft(self, context: Tensor, tokens: Sequence[int], shape: tuple[int, int]) -> Beams:
        """Draft for a batch.

        Args:
            context: ``[B, H]``, hidden states that predicted ``tokens``.
            tokens: B known tokens.
            shape: beam width and draft length, at most those of the options.
        """
        return self._draft(context, torch.tensor(tokens, dtype=torch.int64), *shape)
