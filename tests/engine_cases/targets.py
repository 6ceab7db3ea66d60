# SPDX-License-Identifier: Apache-2.0
"""Tiny targets that are stored or computed in other ways than a Llama in float32.

Quantized ones in the format of compressed-tensors; models that scale embeddings or logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engine_v1.engines import tokens
from engine_v1.tiny_target import (
    HEAD_DIM,
    HIDDEN,
    MLP,
    VOCAB,
    prompts,
    tiny_drafter,
    write_target,
)
from safetensors.torch import load_file, save_file
from tiny_models import EOS, write_byte_tokenizer
from torch import Tensor

from engine_cases.cases import greedy, seeded
from engine_cases.run import sampling_params
from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter

W8A8, W4A16 = "W8A8", "W4A16"
GROUP = 32


def quantize(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Signed integers and their scales, ``[rows, 1]`` or ``[rows, columns / group]``."""
    rows, columns = weight.shape
    parts = weight.view(rows, -1, group or columns)
    most = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(-1, keepdim=True) / most
    whole = (parts / scale).round().clamp(-most - 1, most)
    return whole.view(rows, columns).to(torch.int8), scale.squeeze(-1)


def pack(values: Tensor, bits: int) -> Tensor:
    """int32 ``[rows, columns * bits / 32]``, the first column in the lowest bits."""
    each = 32 // bits
    shifted = (values.long() + 2 ** (bits - 1)).view(values.shape[0], -1, each)
    shifted = (shifted << (torch.arange(each) * bits)).sum(-1)
    return torch.where(shifted >= 2**31, shifted - 2**32, shifted).to(torch.int32)


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    values, scale = quantize(weight, 4, GROUP)
    return {
        f"{name}_packed": pack(values, 4),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }


def _scheme(bits: int, group: int | None) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}


def write_quantized(
    directory: Path, source: Path, kind: str, embedding: bool = False, dtype: str = "float32"
) -> Path:
    """The target in ``source`` with all linear layers quantized, the output head too.

    Args:
        directory: made if missing.
        kind: ``W8A8`` or ``W4A16``.
        embedding: the embedding as well, to 4 bits.
        dtype: of what is not quantized.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        is_table = name.endswith("embed_tokens.weight")
        if weight.dim() != 2 or (is_table and not embedding):
            tensors[name] = weight
        elif is_table or kind == W4A16:
            tensors |= _packed(name, weight)
        else:
            tensors[name], tensors[f"{name}_scale"] = quantize(weight, 8, None)
    directory.mkdir(parents=True, exist_ok=True)
    floats = getattr(torch, dtype)
    tensors = {n: t.to(floats) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    linear = {
        "targets": ["Linear", "re:.*lm_head"],
        "weights": _scheme(4, GROUP) if kind == W4A16 else _scheme(8, None),
        "input_activations": None if kind == W4A16 else {**activations, "strategy": "token"},
        "format": "pack-quantized" if kind == W4A16 else "int-quantized",
    }
    groups = {"group_0": linear}
    if embedding:
        groups["group_1"] = {
            "targets": ["VocabParallelEmbedding"], "weights": _scheme(4, GROUP),
            "input_activations": None, "format": "pack-quantized",
        }  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = dtype
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "config_groups": groups, "ignore": [],
        "format": linear["format"] if not embedding else "mixed-precision",
        "quantization_status": "compressed",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(directory)
    return directory


# What differs from ``engine_v1.tiny_target``: scales of embeddings or logits.
SCALED = {
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 0.25, "residual_multiplier": 0.8},
    "cohere": {"logit_scale": 0.4},
}


def write_scaled(directory: Path, family: str) -> Path:
    """A random model of a family in ``SCALED``, float32, whose greedy output is varied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=None, max_position_embeddings=512, **SCALED[family],
    )  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # What layers add must be as large as the embedding, whatever scales that.
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            gain = 12.0 if adds and family == "gemma" else 2.0
            scale = 1.0 if "embed_tokens" in name else gain / parameter.shape[1] ** 0.5
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory


ADDED = 24


def write_with_added_tokens(directory: Path) -> Path:
    """A target with ``ADDED`` tokens beyond the vocabulary of ``tiny_drafter``."""
    write_target(directory, vocab=VOCAB + ADDED)
    write_byte_tokenizer(directory)
    return directory


def write_drafter(directory: Path, shared_head: bool = False) -> Path:
    """A random drafter for any target here, with an output head of its own or the target's."""
    drafter = tiny_drafter()
    if shared_head:
        torch.manual_seed(1)
        config = DrafterConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, exit_dim=HIDDEN, num_draft_layers=1, rnn=True,
            draft_vocab_size=VOCAB, shared_head=True,
        )  # fmt: skip
        drafter = Drafter(config)
    save_drafter(drafter, directory)
    return directory


def check(pair: Any, count: int = 8, length: int = 24) -> list[list[int]]:
    """Answers equal to plain vLLM's, with an oracle's trees and with the drafter's own.

    Args:
        count: how many, of ``length`` tokens.

    Returns:
        the answers.
    """
    kinds = [greedy(max_tokens=length), seeded(1, max_tokens=length)]
    params = [sampling_params(kinds[i % 2]) for i in range(count)]
    run = pair.run(prompts(count), params)
    run.assert_equal()
    run.assert_saw_trees(moves=1, accepted=0.5)
    said = tokens(run.got)
    assert sum(len(set(row)) > length // 3 for row in said) > count // 2, "nearly nothing is said"
    pair.trees.reset()
    assert tokens(pair.trees.generate(prompts(count), params)) == said
    assert pair.trees.stats["drafts"] > count // 2 and not pair.trees.stats["fallbacks"]
    return said
