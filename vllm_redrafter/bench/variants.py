# SPDX-License-Identifier: Apache-2.0
"""What engines are compared: vLLM's `speculative_config` of each."""

import importlib.util
from pathlib import Path
from typing import Any

BUNDLED_DRAFTER = Path(__file__).resolve().parents[1] / "drafters" / "redrafter-smollm2-135m"

PLAIN, REDRAFTER, CHAIN, NGRAM = "plain", "redrafter", "chain", "ngram"
TREE, SUFFIX = "tree", "suffix"

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


def drafter_alone(drafter: str | Path, width: int, length: int, nodes: int) -> dict[str, Any]:
    """A tree of fixed size from the drafter's own candidates."""
    return redrafter_config(
        drafter, beam_width=width, draft_length=length, num_speculative_tokens=nodes,
        prompt_lookup=False, node_budget="fixed",
    )  # fmt: skip


def has_suffix_decoding() -> bool:
    """Whether the package that vLLM's suffix decoding needs is installed."""
    return importlib.util.find_spec("arctic_inference") is not None
