# SPDX-License-Identifier: Apache-2.0
"""Requests that get no draft, beside others that do: LoRA, embeddings, a thinking budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engine_v1.tiny_target import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, prompts
from safetensors.torch import load_file, save_file

from engine_cases.cases import IDS, greedy
from engine_cases.run import assert_same, sampling_params, streams_of

SPEC = {"spec_beam_width": 6, "spec_draft_length": 4, "spec_num_speculative_tokens": 15}
RANK = 8
BUDGET = 4
# One token each.
THINK, ENOUGH = "<", ">"

LORA = "LoRA (no draft)"
EMBEDDINGS = "prompt embeddings (no draft)"
THINKING = "a thinking token budget (no draft)"


def settings(reason: str) -> dict[str, Any]:
    """Of ``LLM``, for both engines; vLLM itself cannot have LoRA beside embeddings on the CPU."""
    from vllm.config import ReasoningConfig

    if reason == LORA:
        return {"enable_lora": True, "max_lora_rank": RANK}
    thinking = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=ENOUGH)
    return {"enable_prompt_embeds": True, "reasoning_config": thinking}


def engines(engine: Any, target: Path, drafter: Path, reason: str) -> tuple[Any, Any]:
    """Plain vLLM and ReDrafter, which drafts by itself.

    Args:
        engine: makes an ``Engine`` of a model runner, as ``engine_v1.engines.engine``.
    """
    more = settings(reason)
    return engine(target, **more), engine(target, drafter, **more, **SPEC)


def write_adapter(directory: Path) -> Path:
    """A random LoRA adapter for ``engine_v1.tiny_target``, strong enough to change every answer."""
    generator = torch.Generator().manual_seed(11)
    widths = {"q_proj": HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    tensors = {}
    for layer in range(LAYERS):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(widths)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def check_lora(plain: Any, trees: Any, adapter: Path) -> None:
    """A request without an adapter, the same one with it, and both in a batch.

    Args:
        plain: an ``Engine`` with ``settings(LORA)``.
        trees: the same with ReDrafter, drafting by itself.
    """
    from vllm.lora.request import LoRARequest

    first, second, *_ = prompts(8)
    with_adapter = LoRARequest("adapter", 1, str(adapter))
    [without] = _compare(plain, trees, [first], [greedy()], set())
    said = _compare(plain, trees, [first], [greedy()], {LORA}, lora_request=[with_adapter])
    assert said != [without], "the adapter changed nothing"
    assert trees.stats["drafts"] == 0
    # vLLM's CPU kernels give the neighbours the adapter as well, with ReDrafter or not, and so the
    # drafts for them, which are made, are bad.
    _compare(
        plain, trees, [first, first, second], [greedy()] * 3, {LORA}, good=False,
        lora_request=[None, with_adapter, None],
    )  # fmt: skip
    assert trees.stats["drafts"] > 5


def check_embeddings_and_budgets(plain: Any, trees: Any, target: Path) -> None:
    """A prompt of embeddings and thinking budgets, beside the same requests without.

    Args:
        plain: an ``Engine`` with ``settings(THINKING)``.
        trees: the same with ReDrafter, drafting by itself.
    """
    table = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    first, second, *_ = prompts(8)
    second = [*second, IDS.index(THINK)]
    budget = greedy(thinking_token_budget=BUDGET)
    asked = [first, {"prompt_embeds": table[first]}, second, second, second]
    params = [greedy(), greedy(), budget, greedy(), {**budget, "max_tokens": 12}]
    said = _compare(plain, trees, asked, params, {EMBEDDINGS, THINKING})
    assert said[1] == said[0], "embeddings of the same tokens say the same"
    end = IDS.index(ENOUGH)
    assert all(end in said[i][: BUDGET + 1] for i in (2, 4)) and end not in said[3][: BUDGET + 1]


def _compare(
    plain: Any,
    trees: Any,
    asked: list[Any],
    params: list[dict[str, Any]],
    reasons: set[str],
    good: bool = True,
    **more: Any,
) -> list[list[int]]:
    """Tokens of ReDrafter's answers, which are plain vLLM's.

    Args:
        reasons: why requests got no draft.
        good: drafts for the other requests, if there are others, are accepted.
    """
    objects = [sampling_params(row) for row in params]
    expected, got = [], []
    for engine, streams in ((plain, expected), (trees, got)):
        engine.reset()
        streams += streams_of(engine.generate(asked, objects, **more))
    assert_same(got, expected)
    stats = trees.stats
    assert stats["fallbacks"].keys() == reasons, stats
    if good and len(asked) > len(reasons):
        assert stats["drafts"] > 3 and stats["acceptance_length"] > 1.2, stats
    return [stream["completions"][0]["tokens"] for stream in got]
