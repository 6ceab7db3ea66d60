# SPDX-License-Identifier: Apache-2.0
"""Thorough checks of a step on Model Runner V1, before the target computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.thorough import require
from vllm_redrafter.engine.tree_step import TreeStep
from vllm_redrafter.engine.v1.tree_check import problem_of


def check_trees(step: Any, positions: Tensor, vocab_size: int) -> None:
    """What the target is about to compute is a tree, at positions by depth.

    Args:
        step: the runner's.
        positions: of all query rows.
        vocab_size: of the target.
    """
    for i, tree in enumerate(step.trees):
        # A chain may be the scheduler's padding.
        if not step.holds_tree(i):
            continue
        problem = problem_of(tree, vocab_size)
        require(not problem, f"a draft is no tree: {problem}")
        root = step.root_row(i)
        places = (positions[root : root + 1 + len(tree)] - positions[root]).tolist()
        require(places == [0, *tree.depths.tolist()], "positions of a tree are not its depths")


def check_tree_step(step: Any, tree_step: TreeStep) -> None:
    """The attention of a step sees the trees and nothing else."""
    starts = dict(
        zip(tree_step.request_index.tolist(), tree_step.row_start.tolist(), strict=True)
    )
    for i, tree in enumerate(step.trees):
        if not step.holds_tree(i):
            continue
        require(i in starts, "a tree is left to attention that takes it for a chain")
        mask = tree_step.masks[starts[i] : starts[i] + 1 + len(tree)]
        seen = torch.from_numpy(tree.masks)
        words = seen.shape[1]
        same = torch.equal(mask[:, :words], seen) and not mask[:, words:].any()
        require(same, "the mask of a step is not its tree's")
