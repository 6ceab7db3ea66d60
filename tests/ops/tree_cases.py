# SPDX-License-Identifier: Apache-2.0
"""Random drafts, random trees and the target's answers to them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
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


def random_beams(
    batch: int, length: int, width: int, vocab: int, *, seed: int, step: float = 0.0
) -> Beams:
    """Beams as a search leaves them: distinct candidates, best first, no score above its parent's.

    A ``step`` rounds log-probabilities to its multiples, so that scores tie.
    """
    generator = torch.Generator().manual_seed(seed)
    root = torch.randint(vocab, (batch,), generator=generator)
    shape = (batch, length, width)
    tokens, parents = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
    scores = torch.empty(shape)
    before = torch.full((batch, width), FILLER_SCORE)
    before[:, 0] = 0
    for depth in range(length):
        steps = torch.log_softmax(torch.randn(batch, width, vocab, generator=generator) * 3, -1)
        if step:
            steps = (steps / step).round() * step
        flat = (before[:, :, None] + steps).flatten(1)
        order = flat.sort(dim=-1, descending=True, stable=True)
        before, index = order.values[:, :width], order.indices[:, :width]
        tokens[:, depth], parents[:, depth], scores[:, depth] = (
            index % vocab,
            index // vocab,
            before,
        )
    return Beams(root, tokens, parents, scores)
