# SPDX-License-Identifier: Apache-2.0
"""What the sweep tries: engine settings and requests at random, as plain values.

A case is ``{"settings": {...}, "oracle": {...}, "requests": [{"prompt", "params", "at", ...}]}``
and can be written as JSON.
"""

from __future__ import annotations

import random
from typing import Any

from engine_v1.tiny_target import EOS

Case = dict[str, Any]

# Of every engine of a sweep: whatever differs must not change what plain vLLM says.
MODEL_LENGTH = 256
DEFAULTS = {
    "max_model_len": MODEL_LENGTH, "max_num_seqs": 8, "block_size": 32,
    "num_gpu_blocks_override": 128, "enable_prefix_caching": True, "enable_chunked_prefill": True,
    "max_num_batched_tokens": 2048, "scheduling_policy": "fcfs", "spec_beam_width": 4,
    "spec_draft_length": 4, "spec_num_speculative_tokens": 15,
}  # fmt: skip


def random_settings(source: random.Random) -> dict[str, Any]:
    """Settings of ``LLM``; ``spec_*`` are ReDrafter's."""
    nodes = source.choice((1, 2, 5, 15, 15, 40))
    block_size = source.choice((32, 64, 128))
    requests = source.choice((1, 2, 4, 8, 8))
    # One request must fit, with the rows of its tree; then others are preempted.
    tight = (MODEL_LENGTH + nodes) // block_size + 2 + source.randrange(8)
    chunked = source.random() < 0.5
    budget = source.choice((nodes + 1, 40, 64, 200)) if chunked else 2048
    settings = DEFAULTS | {
        "max_num_seqs": requests,
        "block_size": block_size,
        "num_gpu_blocks_override": tight if source.random() < 0.4 else 4096 // block_size,
        "enable_prefix_caching": source.random() < 0.6,
        "max_num_batched_tokens": max(budget, nodes + 1, requests),
        "scheduling_policy": source.choice(("fcfs", "fcfs", "priority")),
        "spec_num_speculative_tokens": nodes,
        "spec_beam_width": source.choice((1, 4, 10)),
        "spec_draft_length": source.choice((1, 4, 6)),
    }
    if chunked and source.random() < 0.3:
        settings["long_prefill_token_threshold"] = max(nodes + 1, 24)
    if source.random() < 0.2:
        schedule = [[1, 2, nodes], [3, 64, nodes // 3]]
        settings["spec_num_speculative_tokens_per_batch_size"] = schedule
    return settings


def has_chunks(settings: dict[str, Any]) -> bool:
    """Whether a prompt may be prefilled in parts, where vLLM's CPU sampler takes no seeds."""
    room = settings["max_num_seqs"] * MODEL_LENGTH
    return settings["max_num_batched_tokens"] < room or "long_prefill_token_threshold" in settings


def random_params(source: random.Random, seeds: bool) -> dict[str, Any]:
    """Fields of ``SamplingParams``: greedy, or with a seed."""
    params: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": source.choice((1, 2, 3, 8, 20, 20, 40, 80)),
        "ignore_eos": source.random() < 0.5,
    }
    if seeds and source.random() < 0.6:
        params["temperature"] = round(source.uniform(0.2, 1.6), 2)
        params["seed"] = source.getrandbits(31)
        if source.random() < 0.3:
            params["top_k"] = source.choice((1, 2, 10, 100))
        if source.random() < 0.3:
            params["top_p"] = source.choice((0.1, 0.5, 0.9))
        if source.random() < 0.15:
            params["n"] = source.choice((2, 3))
    choices: dict[str, Any] = {
        "repetition_penalty": lambda: source.choice((0.8, 1.2, 1.8)),
        "presence_penalty": lambda: source.choice((-1.0, 0.6)),
        "frequency_penalty": lambda: source.choice((-0.5, 0.7)),
        "min_tokens": lambda: source.randrange(params["max_tokens"] + 1),
        "stop_token_ids": lambda: source.sample(range(EOS), 12),
        "stop": lambda: source.sample("abcdefghijklmnop", 3),
        "bad_words": lambda: source.sample("abcdefghijklmnop", 2),
        "allowed_token_ids": lambda: sorted(source.sample(range(EOS), 60)),
        "logprobs": lambda: source.randrange(4),
        "prompt_logprobs": lambda: source.randrange(3),
    }
    for name, value in choices.items():
        if source.random() < 0.12:
            params[name] = value()
    return params


def random_requests(source: random.Random, count: int, settings: dict[str, Any]) -> list[Case]:
    """Prompts with shared beginnings; arrivals over some steps; a few that are taken back."""
    seeds = not has_chunks(settings)
    starts = [[source.randrange(EOS) for _ in range(70)] for _ in range(3)]
    requests = []
    for _ in range(count):
        prompt = [source.randrange(EOS) for _ in range(source.choice((1, 3, 10, 40, 100)))]
        if source.random() < 0.4:
            prompt = source.choice(starts)[: source.randrange(1, 71)] + prompt
        if source.random() < 0.2:
            prompt = prompt * 2  # text that repeats
        request = {
            "prompt": prompt[: MODEL_LENGTH - 2],
            "params": random_params(source, seeds),
            "at": source.choice((0, 0, 0, source.randrange(30))),
        }
        if settings["scheduling_policy"] == "priority":
            request["priority"] = source.randrange(3)
        if source.random() < 0.04:
            request["aborted_after"] = source.randrange(1, 12)
        requests.append(request)
    return requests


def random_case(source: random.Random, settings: dict[str, Any], count: int) -> Case:
    """One batch for an engine with these settings."""
    return {
        "settings": settings,
        "oracle": {
            "seed": source.getrandbits(31),
            "chain_first": source.random() < 0.3,
            "chains": source.choice((0.0, 0.1, 0.5)),
            "empty": source.choice((0.0, 0.05, 0.5)),
        }
        if source.random() < 0.8
        else None,
        "requests": random_requests(source, count, settings),
    }
