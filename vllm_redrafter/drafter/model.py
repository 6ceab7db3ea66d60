# SPDX-License-Identifier: Apache-2.0
"""The recurrent drafter: one evaluation maps (context, last token, state) to logits.

Source: arXiv 2403.09919, section 3.1; tensor names and the exact cell follow the public checkpoint
format of apple/ml-recurrent-drafter (``recurrent_drafting/modeling_drafter.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_redrafter.drafter.config import DrafterConfig


class ResidualBlock(nn.Module):
    """``x + SiLU(linear(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Drafter(nn.Module):
    """Apple's recurrent drafter, with an optional draft vocabulary and shared head.

    The module's ``state_dict`` has Apple's names: ``input_proj``, ``lm_head.{i}.linear``,
    ``lm_head.{n}``, ``rnn_u``, ``rnn_w``. The target's input embedding is bound, never owned: it
    is neither a parameter nor part of the state dict.

    Attributes:
        config: the shapes.
        embedding: the target's input embedding table, ``[vocab_size, hidden_size]``.
        draft_vocab: ``[draft_vocab_size]`` int64; row i of the head scores token
            ``draft_vocab[i]``. None when the head covers the whole vocabulary.
    """

    embedding: Tensor | None
    draft_vocab: Tensor | None

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.exit_dim
        if config.has_input_proj:
            self.input_proj = nn.Linear(2 * hidden, width)
        blocks = [ResidualBlock(width) for _ in range(config.num_draft_layers)]
        head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.lm_head = nn.ModuleList([*blocks, head])
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        self.register_buffer("draft_vocab", None, persistent=False)
        self.register_buffer("embedding", None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head[-1].weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Target embeddings of ``tokens``, ``[..., hidden_size]`` in the drafter's dtype."""
        if self.embedding is None:
            raise RuntimeError("Drafter.embedding is not set; bind the target's embedding table.")
        return F.embedding(tokens, self.embedding).to(self.dtype)

    def initial_state(self, *shape: int) -> Tensor:
        """The state before the first evaluation: zeros, ``[*shape, hidden_size]``."""
        weight = self.lm_head[-1].weight
        return torch.zeros(*shape, self.config.hidden_size, dtype=self.dtype, device=weight.device)

    def forward(self, context: Tensor, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One evaluation.

        Args:
            context: ``[..., H]``, the target's hidden state after its final norm, at the position
                before the known token.
            tokens: ``[...]`` int64, the last token of each beam.
            state: ``[..., H]``, the recurrent state of each beam.

        Returns:
            logits ``[..., draft_vocab_size]`` in the drafter's dtype, and the new state.
        """
        embedded = self.embed(tokens)
        if self.config.rnn:
            state = F.silu(self.rnn_w(embedded) + self.rnn_u(state))
        else:
            state = embedded + state
        x = torch.cat([context.to(self.dtype), state], dim=-1)
        if self.config.has_input_proj:
            x = self.input_proj(x)
        for layer in self.lm_head:
            x = layer(x)
        return x, state

    def to_target_ids(self, rows: Tensor) -> Tensor:
        """Token ids of the target's vocabulary for rows of the head."""
        return rows if self.draft_vocab is None else self.draft_vocab[rows]
