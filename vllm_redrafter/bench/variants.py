# SPDX-License-Identifier: Apache-2.0
"""What engines are compared: vLLM's `speculative_config` of each."""

import importlib.util
from pathlib import Path
from typing import Any

BUNDLED_DRAFTER = Path(__file__).resolve().parents[1] / "drafters" / "redrafter-smollm2-135m"

PLAIN, REDRAFTER, CHAIN, NGRAM = "plain", "redrafter", "chain", "ngram"
BEAMS, SUFFIX = "beams", "suffix"
LABELS = {
    PLAIN: "plain vLLM",
    REDRAFTER: "ReDrafter",
    NGRAM: "vLLM's n-gram, 5 tokens",
    SUFFIX: "vLLM's suffix decoding",
    CHAIN: "ReDrafter, a chain",
    BEAMS: "ReDrafter, Apple's tree",
}

NGRAM_CONFIG: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
# All else is vLLM's default: up to 24 tokens, the outputs of earlier requests among its sources.
SUFFIX_CONFIG: dict[str, Any] = {"method": "suffix"}


def redrafter_config(drafter: str | Path, **given: Any) -> dict[str, Any]:
    """ReDrafter with its defaults, except for what is given."""
    return {"method": "redrafter", "model": str(drafter), **given}


def known_variants(drafter: str | Path, **given: Any) -> dict[str, dict[str, Any]]:
    """The variants that have a name, plain vLLM left out, by that name.

    Args:
        given: further keys for ReDrafter with its defaults.
    """
    return {
        REDRAFTER: redrafter_config(drafter, **given),
        NGRAM: dict(NGRAM_CONFIG),
        SUFFIX: dict(SUFFIX_CONFIG),
        # One beam, and no lookup, which would make it a tree again.
        CHAIN: redrafter_config(
            drafter, beam_width=1, prompt_lookup=False, node_budget="fixed"
        ),
        BEAMS: redrafter_config(drafter, tree="beams"),
    }  # fmt: skip


def fixed_size(drafter: str | Path, setting: tuple[int, int, int], **given: Any) -> dict[str, Any]:
    """A tree of always as many nodes.

    Args:
        setting: beam width, draft length, nodes.
        given: further keys.
    """
    width, length, nodes = setting
    return redrafter_config(
        drafter, beam_width=width, draft_length=length, num_speculative_tokens=nodes,
        node_budget="fixed", **given,
    )  # fmt: skip


def default_variants() -> list[str]:
    """Names of what is compared with plain vLLM where nothing else is asked for."""
    return [REDRAFTER, NGRAM, CHAIN, BEAMS, *([SUFFIX] if has_suffix_decoding() else [])]


def has_suffix_decoding() -> bool:
    """Whether the package that vLLM's suffix decoding needs is installed."""
    return importlib.util.find_spec("arctic_inference") is not None
