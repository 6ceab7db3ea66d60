# SPDX-License-Identifier: Apache-2.0
"""The drafter while it learns: all offsets at once, inputs of unit scale.

A target's hidden states have means and scales that differ by an order of magnitude between
dimensions, and embeddings are small: a network that starts at the usual scale hardly sees some and
saturates on others. So training sees standardised states, and with the target's own head the inner
width is in units of the states' spread too. Both are changes of units: `export` folds them
into the weights exactly, and what is saved is a plain drafter; `take` goes the other way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter


class TrainableDrafter(nn.Module):
    """A drafter with changed units; ``drafter`` owns the parameters, in those units.

    Args:
        config: shapes.
        embedding: ``[rows, H]``, the target's; not owned.
        head: ``[V', H]``, the target's rows for the draft vocabulary.
        head_kind: "shared" (frozen), "tuned" (starts as ``head``) or "own".
        states: ``[R, H]``, a sample of the target's hidden states, for their mean and spread.
    """

    def __init__(
        self,
        config: DrafterConfig,
        embedding: Tensor,
        head: Tensor,
        head_kind: str,
        states: Tensor,
    ) -> None:
        super().__init__()
        self.config = config
        self.drafter = Drafter(config)
        self.drafter.embedding = embedding
        mean, spread = states.float().mean(0), states.float().std(0).clamp(min=1e-6)
        hidden, width = config.hidden_size, config.exit_dim
        # Without an input projection there is nothing that units could be folded into.
        fold_in = config.has_input_proj
        fold_out = fold_in and head_kind in ("shared", "tuned")
        self.register_buffer("in_mean", mean if fold_in else torch.zeros(hidden))
        self.register_buffer("in_scale", spread if fold_in else torch.ones(hidden))
        self.register_buffer("out_mean", mean.clone() if fold_out else torch.zeros(width))
        self.register_buffer("out_scale", spread.clone() if fold_out else torch.ones(width))
        output = self.drafter.lm_head[-1]
        with torch.no_grad():
            if head_kind != "own":
                output.weight.copy_(head)
            if config.rnn:
                # Embeddings of standard deviation 1 is what the cell's usual start expects.
                self.drafter.rnn_w.weight /= embedding.float().std().clamp(min=1e-6)
            if fold_out:
                # Start near the mean state, whose logits are near the tokens' frequencies.
                self.drafter.input_proj.weight *= 0.3
                self.drafter.input_proj.bias.zero_()
        output.requires_grad_(head_kind != "shared")

    @property
    def head(self) -> Tensor:
        """``[V', X]``, what the features are multiplied with."""
        return self.drafter.lm_head[-1].weight

    def forward(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Features before the head, for every offset.

        Args:
            context: ``[P, H]``, hidden states of the target, in its own units.
            tokens: ``[P, K]`` int64: the known token, then the tokens that were drafted.

        Returns:
            ``[K, P, X]``; offset i predicts what follows ``tokens[:, i]``.
        """
        drafter, offsets = self.drafter, tokens.shape[1]
        embedded = drafter.embed(tokens)
        state = drafter.initial_state(len(tokens))
        states = []
        for i in range(offsets):
            if self.config.rnn:
                state = F.silu(drafter.rnn_w(embedded[:, i]) + drafter.rnn_u(state))
            else:
                state = embedded[:, i] + state
            states.append(state)
        stacked = torch.stack(states)
        context = (context.to(drafter.dtype) - self.in_mean) / self.in_scale
        if self.config.has_input_proj:
            # The context is the same for all offsets: multiply it once.
            from_context, from_state = drafter.input_proj.weight.split(self.config.hidden_size, 1)
            y = F.linear(stacked, from_state) + F.linear(
                context, from_context, drafter.input_proj.bias
            )
            x = self.out_mean + self.out_scale * y
        else:
            x = torch.cat([context.expand(offsets, -1, -1), stacked], -1)
        for block in drafter.lm_head[:-1]:
            x = x + F.silu(block.linear((x - self.out_mean) / self.out_scale))
        return x

    @torch.no_grad()
    def take(self, drafter: Drafter) -> None:
        """Start from a finished drafter: the inverse of `export`, up to rounding.

        Its head is taken where it stores one. Blocks that it lacks come behind its own and start
        as the identity.

        Args:
            drafter: of the same shapes, with at most as many blocks.
        """
        tensors = {name: t.double().cpu() for name, t in drafter.state_dict().items()}
        in_mean, in_scale = self.in_mean.double().cpu(), self.in_scale.double().cpu()
        out_mean, out_scale = self.out_mean.double().cpu(), self.out_scale.double().cpu()
        taken, blocks = drafter.config.num_draft_layers, self.config.num_draft_layers
        head = tensors.pop(f"lm_head.{taken}.weight")
        if not drafter.config.shared_head:
            tensors[f"lm_head.{blocks}.weight"] = head
        if self.config.has_input_proj:
            weight, bias = tensors["input_proj.weight"], tensors["input_proj.bias"]
            from_context, from_state = (weight / out_scale[:, None]).split(
                self.config.hidden_size, 1
            )
            tensors["input_proj.weight"] = torch.cat([from_context * in_scale, from_state], 1)
            tensors["input_proj.bias"] = (bias - out_mean) / out_scale + from_context @ in_mean
        for i in range(taken):
            weight = tensors[f"lm_head.{i}.linear.weight"]
            tensors[f"lm_head.{i}.linear.bias"] += weight @ out_mean
            tensors[f"lm_head.{i}.linear.weight"] = weight * out_scale
        for block in self.drafter.lm_head[taken:blocks]:
            # SiLU(0) is 0 but its slope is not: the identity, and yet it learns.
            nn.init.zeros_(block.linear.weight)
            nn.init.zeros_(block.linear.bias)
        self.drafter.load_state_dict(tensors, strict=False)

    @torch.no_grad()
    def export(self, draft_vocab: Tensor | None, dtype: torch.dtype) -> Drafter:
        """The plain drafter that computes the same from states in the target's own units.

        Args:
            draft_vocab: ``[V']`` int64, or None.
            dtype: of the stored weights; folding is done in float64.
        """
        tensors = {name: t.double().cpu() for name, t in self.drafter.state_dict().items()}
        in_mean, in_scale = self.in_mean.double().cpu(), self.in_scale.double().cpu()
        out_mean, out_scale = self.out_mean.double().cpu(), self.out_scale.double().cpu()
        if self.config.has_input_proj:
            weight, bias = tensors["input_proj.weight"], tensors["input_proj.bias"]
            from_context, from_state = weight.split(self.config.hidden_size, 1)
            from_context = from_context / in_scale
            bias = bias - from_context @ in_mean
            weight = torch.cat([from_context, from_state], 1)
            tensors["input_proj.weight"] = out_scale[:, None] * weight
            tensors["input_proj.bias"] = out_mean + out_scale * bias
        for i in range(self.config.num_draft_layers):
            weight = tensors[f"lm_head.{i}.linear.weight"] / out_scale
            tensors[f"lm_head.{i}.linear.weight"] = weight
            tensors[f"lm_head.{i}.linear.bias"] -= weight @ out_mean
        drafter = Drafter(self.config)
        drafter.load_state_dict(tensors)
        drafter.draft_vocab = draft_vocab
        return drafter.to(dtype).requires_grad_(False).eval()
