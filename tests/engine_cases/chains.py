# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets of which no tree can be verified: recurrent layers, or MLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_v1.tiny_target import HEAD_DIM, HIDDEN, MLP, VOCAB
from tiny_models import EOS, write_byte_tokenizer

_MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 32,
}  # fmt: skip
_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_intermediate_size": 32,
}  # fmt: skip
# As DeepSeek's own models have them: vLLM's kernel for CPUs turns plain rotary keys wrong here.
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# Of vLLM's only kernel for CPUs: latent rows of 512 + 64.
_MLA = {
    "rope_parameters": _YARN, "kv_lora_rank": 512, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64, "v_head_dim": 32,
    "head_dim": 64, "num_key_value_heads": 4, "first_k_dense_replace": 2, **_EXPERTS,
}  # fmt: skip

# What a family's config has beyond the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_hidden_layers": 2, "q_lora_rank": None, **_MLA},
    "deepseek_v3": {"num_hidden_layers": 2, "q_lora_rank": 32, **_MLA},
    # Gated delta nets; dense, because mixtures of experts need a process of their own.
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": HEAD_DIM,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "mlp_only_layers": [0, 1, 2],
    },
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA2},
    "falcon_h1": {"mamba_d_ssm": 128, "head_dim": HEAD_DIM, **_MAMBA2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": MLP, **_MAMBA2,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 16,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "conv_dim": HIDDEN,
        "block_ff_dim": MLP, "block_auto_adjust_ff_dim": False,
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": HEAD_DIM,
        "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 32,
    },
}  # fmt: skip


def config_of(family: str) -> Any:
    """The Hugging Face config of a family."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    return AutoConfig.for_model(family, **sizes | FAMILIES[family])


def write_chained(directory: Path, family: str, dtype: str = "float32") -> Path:
    """A random model of a family in ``FAMILIES``, whose greedy output is varied."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "conv" not in name and "A_log" not in name:
            scale = 1.0 if "embed" in name else 2.0 / parameter.shape[1] ** 0.5
            torch.nn.init.normal_(parameter, std=scale)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory
