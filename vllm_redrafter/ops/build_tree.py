# SPDX-License-Identifier: Apache-2.0
"""From one draft to the trees that are verified, with their ancestor masks."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.ops.library import compiled_available
from vllm_redrafter.tree import build as twin
from vllm_redrafter.tree.rules import TREE_RULES, TreeRule
from vllm_redrafter.tree.tree import MASK_WORD_BITS, Tree


def build_tree(
    beams: Beams, rule: TreeRule = "best", num_nodes: int | None = None
) -> tuple[Tree, Tensor]:
    """``vllm_redrafter.tree.build.build_tree`` and its ``Tree.packed_mask``, in one compiled call.

    All integers are those of the twin, padding included; trees are padded to the largest of the
    batch.

    Args:
        beams: the draft.
        rule: ``best`` or ``beams``.
        num_nodes: the most nodes a tree may have, not counting the root; None for no limit.

    Returns:
        tree: ``Tree`` of M columns.
        masks: ``[B, M, ceil(M / 64)]`` int64, bit j % 64 of word j // 64 of row i is set iff node
            j is node i or its ancestor.

    Raises:
        ValueError: an unknown rule, or ``num_nodes`` below 0.
        RuntimeError: beams that are none (compiled operator): a parent outside the beam width, or
            under ``best`` a candidate with a higher score than its parent's.
    """
    if rule not in TREE_RULES or (num_nodes is not None and num_nodes < 0):
        twin.build_tree(beams, rule, num_nodes)  # raises
    if not (compiled_available() and beams.tokens.device.type == "cpu"):
        tree = twin.build_tree(beams, rule, num_nodes)
        return tree, tree.packed_mask()
    batch, length, width = beams.tokens.shape
    most = 1 + (length * width if num_nodes is None else min(num_nodes, length * width))
    tokens, parents, depths = torch.empty(3, batch, most, dtype=torch.int64)
    masks = torch.empty(batch, most, -(-most // MASK_WORD_BITS), dtype=torch.int64)
    counts = torch.empty(batch, dtype=torch.int64)
    torch.ops.redrafter.build_tree.default(
        tokens, parents, depths, masks, counts, beams.root.contiguous(), beams.tokens.contiguous(),
        beams.parents.contiguous(), beams.scores.contiguous(), rule == "best",
    )  # fmt: skip
    used = int(counts.max()) if batch else 1
    if used < most:
        tokens, parents, depths = tokens[:, :used], parents[:, :used], depths[:, :used]
        masks = masks[:, :used, : -(-used // MASK_WORD_BITS)]
    return Tree(tokens, parents, depths, counts), masks


if compiled_available():

    @torch.library.register_fake("redrafter::build_tree")
    def _(out_tokens: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""
