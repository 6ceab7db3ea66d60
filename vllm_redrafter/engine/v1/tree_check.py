# SPDX-License-Identifier: Apache-2.0
"""Whether a drafted tree is one; looked at before the scheduler sees its tokens.

A wrong topology gives wrong tokens without an error: masks and positions come from it.
"""

from __future__ import annotations

import numpy as np

from vllm_redrafter.engine.v1.request_tree import RequestTree

_WORD_BITS = 64


class BadTree(ValueError):
    """A draft that is no tree; the message says why."""


def problem_of(tree: RequestTree, vocab_size: int) -> str:
    """What is wrong with a tree, '' if nothing is.

    Args:
        vocab_size: of the target.
    """
    count = len(tree.tokens)
    sizes = len(tree.parents), len(tree.depths), len(tree.masks) - 1
    if sizes != (count,) * 3:
        return f"{count} tokens have {sizes[0]} parents, {sizes[1]} depths and {sizes[2]} masks"
    depths, words = [0, *tree.depths.tolist()], tree.masks.view(np.uint64).tolist()
    if _bits(words[0]) != 1:
        return "the root does not see itself alone"
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True), start=1):
        if not 0 <= parent < node:
            return f"node {node} has parent {parent}"
        if depths[node] != depths[parent] + 1:
            return f"node {node} has depth {depths[node]}, its parent {parent} {depths[parent]}"
        if not 0 <= token < vocab_size:
            return f"node {node} has token {token}, of {vocab_size}"
        if _bits(words[node]) != _bits(words[parent]) | 1 << node:
            return f"node {node} does not see what its parent {parent} sees, and itself"
    for name in ("probabilities", "sources"):
        values = getattr(tree, name)
        if values is not None and not (len(values) == count and np.isfinite(values).all()):
            return f"its {name} are not {count} finite numbers"
    return ""


def _bits(words: list[int]) -> int:
    """A row of a mask as one number."""
    if len(words) == 1:
        return words[0]
    return sum(word << _WORD_BITS * place for place, word in enumerate(words))
