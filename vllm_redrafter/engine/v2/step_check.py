# SPDX-License-Identifier: Apache-2.0
"""Thorough checks of a step on Model Runner V2; they read the device and make the host wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_redrafter.engine.thorough import require
from vllm_redrafter.engine.tree_step import TreeStep
from vllm_redrafter.engine.v2.tree_check import are_trees
from vllm_redrafter.engine.v2.tree_store import Drafted, TreeStore
from vllm_redrafter.tree.tree import Tree


def check_trees(trees: TreeStore, input_batch: Any, positions: Tensor) -> None:
    """What the target is about to compute is a tree, at positions by depth.

    Args:
        trees: the topology of all requests.
        input_batch: vLLM's ``InputBatch``.
        positions: of all query rows.
    """
    slots = input_batch.idx_mapping
    parents = trees.parents[slots]
    tree = Tree(torch.zeros_like(parents), parents, trees.depths[slots], trees.num_nodes[slots])
    drafted = Drafted(tree, trees.masks[slots], trees.sources[slots])
    # Tokens are vLLM's to carry.
    good = are_trees(drafted, trees.alone, vocab_size=1)
    require(bool(good.all()), "what is kept of a draft is no tree")
    rows = input_batch.logits_indices.long()
    nodes = input_batch.expanded_local_pos.long()
    first = torch.arange(len(rows), device=rows.device) - nodes
    roots = positions[rows[first]]
    depths = trees.depths[input_batch.expanded_idx_mapping, nodes]
    same = torch.equal(positions[rows], roots + depths)
    require(same, "positions of a tree are not its depths")


def check_tree_step(trees: TreeStore, input_batch: Any, step: TreeStep) -> None:
    """The attention of a step sees the trees and nothing else."""
    rows = input_batch.logits_indices.long()
    covered = rows < step.masks.shape[0]
    nodes = input_batch.expanded_local_pos.long()[covered]
    wanted = trees.masks[input_batch.expanded_idx_mapping[covered], nodes]
    require(torch.equal(step.masks[rows[covered]], wanted), "the mask of a step is not its tree's")
