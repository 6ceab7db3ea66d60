# SPDX-License-Identifier: Apache-2.0
"""Targets by their shape alone, and drafters with random weights for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.config import DrafterConfig, load_config
from vllm_redrafter.drafter.model import Drafter

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    # For rehearsals: 32 is the smallest head that vLLM's CPU attention takes.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    },
}
MOST_DRAFT_VOCAB = 16384


def write_target(name: str, folder: Path) -> Path:
    """A model directory that holds a config.json and nothing else; for ``load_format="dummy"``."""
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**LLAMA, **SHAPES[name]}, indent=1) + "\n")
    return directory


def write_drafter(name: str, folder: Path) -> Path:
    """Random weights: one recurrent step, two residual blocks, 16,384 drafted tokens at most.

    Raises:
        DrafterError: there is a directory of that name already, and it is none.
    """
    directory = folder / f"{name}-drafter"
    if directory.is_dir():
        load_config(directory)
        return directory
    shape = SHAPES[name]
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    config = DrafterConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        exit_dim=hidden,
        num_draft_layers=2,
        rnn=True,
        draft_vocab_size=min(vocab, MOST_DRAFT_VOCAB),
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.get("torch_dtype", "bfloat16")))
    try:
        drafter = Drafter(config).requires_grad_(False)
        for parameter in drafter.parameters():
            parameter.normal_(std=(2.0 / parameter.shape[-1]) ** 0.5)
    finally:
        torch.set_default_dtype(before)
    if config.has_draft_vocab:
        drafter.draft_vocab = torch.randperm(vocab)[: config.draft_vocab_size].sort().values
    save_drafter(drafter, directory)
    return directory
