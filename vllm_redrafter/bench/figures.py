# SPDX-License-Identifier: Apache-2.0
"""The figures of one set at one batch size: from a comparison to plain values, without its runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_redrafter.bench.compare import Comparison

# By the baseline's answers: which go in circles (see `training.repeats`).
ALL, NOT_LOOPING, LOOPING = "all", "not looping", "looping"


def figures(result: Comparison, categories: Sequence[str] = ()) -> dict[str, Any]:
    """Everything about one batch size.

    Args:
        categories: of every prompt, for figures by category; at batch size 1 only, where a prompt
            is a group of its own.
    """
    groups = {run.group for run in result.runs}
    looping = result.looping_groups()
    parts: dict[str, Collection[int] | None] = {ALL: None}
    alone = result.settings.batch_size == 1
    if alone:
        # Only here a group is one answer.
        parts |= {NOT_LOOPING: groups - looping, LOOPING: looping}
    return {
        "batch_size": result.settings.batch_size,
        "groups": len(groups),
        "looping_groups": len(looping),
        # Timed calls per engine: groups times rounds, unless the time was up.
        "calls": len(result.of(result.baseline)),
        "other_load": result.other_load(),
        "settings": asdict(result.settings),
        "variants": {
            name: {
                "equality": None if name == result.baseline else asdict(result.equality(name)),
                "startup_seconds": result.startup_seconds.get(name, 0.0),
                "requests": single_requests(result, name),
                **{
                    part: one_variant(result, name, chosen)
                    for part, chosen in parts.items()
                    if chosen is None or chosen
                },
            }
            for name in result.variants
        },
        "categories": by_category(result, categories) if alone and len(set(categories)) > 1 else {},
    }


def one_variant(result: Comparison, name: str, groups: Collection[int] | None) -> dict[str, Any]:
    """Summary and ratio to plain vLLM over some groups of prompts."""
    ratio = None if name == result.baseline else asdict(result.ratio(name, groups))
    return {**asdict(result.summary(name, groups)), "ratio": ratio}


def single_requests(result: Comparison, name: str) -> dict[str, Any]:
    """`compare.Requests` of looping and other answers, at any batch size; {} without times."""
    everything = {prompt for run in result.runs for prompt in run.prompts}
    looping = result.looping_prompts()
    parts = {ALL: everything, NOT_LOOPING: everything - looping, LOOPING: looping}
    found = {part: asdict(result.requests(name, prompts)) for part, prompts in parts.items()}
    return {part: one for part, one in found.items() if one["requests"] and one["first_ms"]}


def by_category(result: Comparison, categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per category the number of prompts, and each variant's ratio to plain vLLM and acceptance.

    Args:
        categories: of every prompt; at batch size 1 a prompt is a group of its own.
    """
    ran = {run.group for run in result.runs}
    found: dict[str, dict[str, Any]] = {}
    for category in dict.fromkeys(categories):
        groups = {i for i, name in enumerate(categories) if name == category} & ran
        if not groups:  # the time was up before
            continue
        found[category] = {"prompts": len(groups)}
        for name in result.variants:
            if name == result.baseline:
                continue
            length = result.summary(name, groups).acceptance_length or 1.0
            ratio = result.ratio(name, groups).overall
            found[category][name] = {"ratio": ratio, "acceptance_length": length}
    return found


def is_drafting(parts: Mapping[str, Any]) -> bool:
    """Whether a variant of a report verified anything at that batch size."""
    return parts[ALL]["acceptance_length"] is not None
