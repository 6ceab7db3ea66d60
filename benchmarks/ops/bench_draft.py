# SPDX-License-Identifier: Apache-2.0
"""The compiled draft against its PyTorch twin and against the time to read its weights.

A drafter for SmolLM2-135M (hidden and exit_dim 576, two blocks, recurrent cell, 8,192-row head,
bfloat16) with random weights. The floor is measured, not computed: the bytes that the draft reads,
summed by torch.sum with the same threads, in the same order (once for every step, so that later
steps may find them in L3) and after the same sweep. ``over_all_bytes_from_memory`` charges every
byte of every step to main memory instead, at the speed of the sweep itself.
"""

from __future__ import annotations

import math

import pytest
import torch

from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops.draft import CompiledDraft

HIDDEN, VOCAB, HEAD_ROWS = 576, 49152, 8192
SETTINGS = {"beam_width": 4, "draft_length": 3, "top_k": 0}


@pytest.fixture(scope="module")
def drafter() -> Drafter:
    torch.manual_seed(0)
    config = DrafterConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        exit_dim=HIDDEN,
        num_draft_layers=2,
        rnn=True,
        draft_vocab_size=HEAD_ROWS,
    )
    drafter = Drafter(config).requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.normal_(std=math.sqrt(2.0 / parameter.shape[-1]))
    drafter.bfloat16()
    drafter.embedding = torch.randn(VOCAB, HIDDEN).bfloat16()
    drafter.draft_vocab = torch.randperm(VOCAB)[:HEAD_ROWS]
    return drafter.eval()


class Floor:
    """Reads what a draft of ``length`` steps reads, and nothing else.

    The copies are made of the packed layers, so that a draft does not find them in a cache because
    the floor was measured just before it, nor the other way round.
    """

    def __init__(self, run: CompiledDraft, length: int) -> None:
        layers = [layer.clone().view(torch.float32) for layer in run._layers if layer.dim() == 4]
        rnn_w, rnn_u, context_half, *rest = layers
        self.steps = [[rnn_w, context_half, *rest]] + [[rnn_w, rnn_u, *rest]] * (length - 1)
        self.bytes = sum(layer.nbytes for step in self.steps for layer in step)

    def __call__(self) -> None:
        for step in self.steps:
            for layer in step:
                layer.sum()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_draft(compare, threads, drafter, batch, cold):
    context = torch.randn(batch, HIDDEN).bfloat16()
    token = torch.randint(VOCAB, (batch,))
    run = CompiledDraft(drafter, **SETTINGS)
    floor = Floor(run, SETTINGS["draft_length"])
    compare(
        lambda: run(context, token),
        {"floor": floor, "twin": lambda: beam_search(drafter, context, token, **SETTINGS)},
        {"floor": 1.5, "twin": 0.5} if cold and batch == 1 else {},
        cold,
        batch=batch,
        bytes=floor.bytes,
    )
