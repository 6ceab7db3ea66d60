# SPDX-License-Identifier: Apache-2.0
"""Random trees and the target's answers to them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from vllm_redrafter.tree.tree import Tree


def random_walk_case(
    batch: int, most_nodes: int, *, depth_bias: float = 0.0, seed: int = 0, vocab: int = 4
) -> tuple[Tree, Tensor]:
    """Ragged trees with distinct siblings, and target tokens that often agree with a child.

    Args:
        batch: B.
        most_nodes: the most nodes of a tree, root included, at least 1.
        depth_bias: how often the last node becomes the parent of the next one.
        seed: of everything.
        vocab: tokens are below it.

    Returns:
        the tree, and ``[B, M]`` target tokens; those of padding agree with what lies there.
    """
    source = random.Random(seed)
    all_tokens, all_parents = [], []
    for _ in range(batch):
        tokens, parents = [source.randrange(vocab)], [-1]
        for _ in range(source.randint(0, most_nodes - 1)):
            last = len(tokens) - 1
            parent = last if source.random() < depth_bias else source.randrange(len(tokens))
            taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
            free = sorted(set(range(vocab)) - taken)
            if free:
                tokens.append(source.choice(free))
                parents.append(parent)
        all_tokens.append(tokens)
        all_parents.append(parents)
    tree = Tree.from_lists(all_tokens, all_parents)
    target = torch.zeros_like(tree.tokens)
    for b, (tokens, parents) in enumerate(zip(all_tokens, all_parents, strict=True)):
        for node in range(len(tokens)):
            children = [t for t, p in zip(tokens, parents, strict=True) if p == node]
            agrees = children and source.random() < 0.8
            target[b, node] = source.choice(children) if agrees else source.randrange(vocab)
    return tree, target
