# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets of the families that have sliding windows or attention sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_v1.tiny_target import HEAD_DIM, HIDDEN, MLP, VOCAB
from tiny_models import EOS, write_byte_tokenizer

# No multiple of a block: windows begin anywhere in one.
WINDOW = 45

_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING, _SLIDING]

# What a family's config has beyond the sizes; by default layers are mixed.
FAMILIES: dict[str, dict[str, Any]] = {
    # Every layer has the window: one KV cache group, whose blocks are freed.
    "mistral": {},
    # With a soft cap on the scores.
    "gemma2": {
        "layer_types": _MIXED, "query_pre_attn_scalar": HEAD_DIM, "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 20.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "layer_types": _MIXED, "query_pre_attn_scalar": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # Sinks in every layer, a window in every other one.
    "gpt_oss": {
        "layer_types": [_SLIDING, _FULL] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "exaone4": {"layer_types": _MIXED, "sliding_window_pattern": "LGLL"},
    # Windows of one position more than the config says.
    "cohere2": {"layer_types": _MIXED, "logit_scale": 0.4},
    "olmo3": {"layer_types": _MIXED},
}  # fmt: skip


def write_windowed(directory: Path, family: str, window: int = WINDOW) -> Path:
    """A random model of a family in ``FAMILIES``, float32, whose greedy output is varied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=None, max_position_embeddings=1024, sliding_window=window,
        **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            # As large as scores are: a sink that is left out shows.
            torch.nn.init.normal_(parameter, mean=2.0, std=1.0)
        elif parameter.dim() >= 2:
            scale = 2.0 / parameter.shape[1] ** 0.5
            if "embed_tokens" in name:
                # Gemma multiplies by the root of the size, and its layers add normalised states.
                scale = HIDDEN**-0.5 / 2 if family.startswith("gemma") else 1.0
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory
