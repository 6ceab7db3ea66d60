# SPDX-License-Identifier: Apache-2.0
"""Which of the drafted trees are trees, told on the device: nothing is read by the host.

A wrong topology gives wrong tokens without an error: masks and positions come from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.engine.v2.tree_store import Drafted
from vllm_redrafter.tree.candidates import SOURCE_NAMES
from vllm_redrafter.tree.tree import NO_PARENT, Tree


def are_trees(drafted: Drafted, alone: Tensor, vocab_size: int) -> Tensor:
    """``[B]`` bool.

    Args:
        drafted: trees of M columns.
        alone: ``[M, words]`` int64, the bit of every node.
        vocab_size: of the target.
    """
    tree, masks, sources = drafted
    size = tree.parents.shape[1]
    columns = torch.arange(size, device=tree.parents.device)
    root = columns == 0
    above = tree.parents.clamp(0, size - 1)
    sees = masks.gather(1, above[:, :, None].expand(-1, -1, masks.shape[2])) | alone
    sound = (tree.parents >= 0) & (tree.parents < columns)
    sound &= tree.depths == tree.depths.gather(1, above) + 1
    sound &= (tree.tokens >= 0) & (tree.tokens < vocab_size)
    sound &= (sources > 0) & (sources <= max(SOURCE_NAMES))
    sound &= (masks == sees).all(-1)
    # The known token is the target's own.
    of_root = (tree.parents == NO_PARENT) & (tree.depths == 0) & (masks == alone).all(-1)
    padding = columns >= tree.num_nodes[:, None]
    counted = (tree.num_nodes >= 1) & (tree.num_nodes <= size)
    return (torch.where(root, of_root, sound) | padding).all(1) & counted


def without_bad_trees(drafted: Drafted, alone: Tensor, vocab_size: int) -> tuple[Drafted, Tensor]:
    """Roots alone in place of what is no tree, and ``[B]`` bool, whose were none; as above."""
    good = are_trees(drafted, alone, vocab_size)
    tree = drafted.tree
    cut = Tree(tree.tokens, tree.parents, tree.depths, torch.where(good, tree.num_nodes, 1))
    return drafted._replace(tree=cut), ~good


def no_trees(batch: int, alone: Tensor) -> Drafted:
    """Roots alone for B requests, in trees of M columns; ``alone`` as above."""
    zeros = torch.zeros(batch, alone.shape[0], dtype=torch.int64, device=alone.device)
    ones = torch.ones(batch, dtype=torch.int64, device=alone.device)
    tree = Tree(zeros, torch.full_like(zeros, NO_PARENT), zeros, ones)
    return Drafted(tree, alone.expand(batch, -1, -1), zeros)
