# SPDX-License-Identifier: Apache-2.0
"""Requests with an adapter beside requests without: all are drafted for, and all are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engine_v1.engines import tokens
from engine_v1.tiny_target import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, prompts
from safetensors.torch import save_file

from engine_cases.cases import greedy, seeded
from engine_cases.run import sampling_params

RANK = 8
# vLLM's CPU kernels give requests without an adapter the last one that there is room for: here
# nobody has it.
SETTINGS = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 3}


def write_adapter(directory: Path, seed: int) -> Path:
    """A random LoRA adapter for ``engine_v1.tiny_target``, strong enough to change every answer."""
    generator = torch.Generator().manual_seed(seed)
    attention = {"q_proj": HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    widths = {
        f"model.layers.{layer}.self_attn.{name}": width
        for layer in range(LAYERS)
        for name, width in attention.items()
    } | {"lm_head": VOCAB}
    tensors = {}
    for name, width in widths.items():
        prefix, scale = f"base_model.model.{name}", 0.2 if name == "lm_head" else 1.0
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = scale * torch.randn(width, RANK, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = [*attention, "lm_head"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def requests(folder: Path, count: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompts, parameters, adapters: every prompt without an adapter and with each of two.

    Args:
        folder: for the adapters.
        count: tokens of each request.
    """
    from vllm.lora.request import LoRARequest

    adapters = [None] + [
        LoRARequest(f"adapter-{i}", i, str(write_adapter(folder / str(i), seed=i))) for i in (1, 2)
    ]
    kinds = [greedy(max_tokens=count), seeded(5, max_tokens=count)]
    asked = [(prompt, adapter) for prompt in prompts(2) for adapter in adapters]
    params = [sampling_params(kinds[i % 2]) for i in range(len(asked))]
    return [prompt for prompt, _ in asked], params, [adapter for _, adapter in asked]


def run(pair: Any, folder: Path, count: int) -> Any:
    batch, params, adapters = requests(folder, count)
    return pair.run(batch, params, more={"lora_request": adapters})


def check(pair: Any, folder: Path, count: int = 20, moves: int = 10) -> None:
    """Equal to plain vLLM with trees of an oracle, and adapters that matter.

    Args:
        pair: of engines with ``SETTINGS``.
        count: tokens of each request.
        moves: KV rows that must have been moved.
    """
    found = run(pair, folder, count)
    found.assert_equal()
    found.assert_saw_trees(moves=moves, accepted=0.5)
    stats = pair.trees.stats
    assert not stats["fallbacks"], stats
    batch, params, _ = requests(folder, count)
    without = tokens(pair.plain.generate(batch, params))
    said = tokens(found.got)
    assert [a != b for a, b in zip(said, without, strict=True)] == [False, True, True] * 2
