# SPDX-License-Identifier: Apache-2.0
"""From one draft to the trees that are verified, with their ancestor masks."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.ops.library import compiled_available, has_kernel
from vllm_redrafter.tree import build as twin
from vllm_redrafter.tree.rules import TREE_RULES, TreeRule
from vllm_redrafter.tree.tree import NO_PARENT, Tree, mask_words, pack_bits


def build_tree(
    beams: Beams,
    rule: TreeRule = "best",
    num_nodes: int | None = None,
    *,
    fixed_size: bool = False,
) -> tuple[Tree, Tensor]:
    """``vllm_redrafter.tree.build.build_tree`` and its ``Tree.packed_mask``, in one compiled call.

    All integers are those of the twin, padding included; trees are padded to the largest of the
    batch. On CUDA, where nothing is read back, they are padded to ``num_nodes + 1`` columns (or to
    as many as W and L allow), and a call can be captured in a CUDA graph.

    Args:
        beams: the draft.
        rule: ``best`` or ``beams``.
        num_nodes: the most nodes a tree may have, not counting the root; None for no limit.
        fixed_size: pad as on CUDA on the CPU too, so that no size depends on what was drafted.

    Returns:
        tree: ``Tree`` of M columns.
        masks: ``[B, M, ceil(M / 64)]`` int64, bit j % 64 of word j // 64 of row i is set iff node
            j is node i or its ancestor.

    Raises:
        ValueError: an unknown rule, or ``num_nodes`` below 0.
        RuntimeError: beams that are none (compiled operator, on the CPU): a parent outside the
            beam width, or under ``best`` a candidate with a higher score than its parent's. On
            CUDA such candidates are left out, with all that hangs on them.
    """
    if rule not in TREE_RULES or (num_nodes is not None and num_nodes < 0):
        twin.build_tree(beams, rule, num_nodes)  # raises
    device = beams.tokens.device
    if not has_kernel(device):
        tree, masks = _twin(beams, rule, num_nodes)
        return _padded(tree, masks, _most(beams, num_nodes)) if fixed_size else (tree, masks)
    batch, most = beams.batch_size, _most(beams, num_nodes)
    tokens, parents, depths = torch.empty(3, batch, most, dtype=torch.int64, device=device)
    words = mask_words(most)
    masks = torch.empty(batch, most, words, dtype=torch.int64, device=device)
    counts = torch.empty(batch, dtype=torch.int64, device=device)
    torch.ops.redrafter.build_tree.default(
        tokens, parents, depths, masks, counts, beams.root.contiguous(), beams.tokens.contiguous(),
        beams.parents.contiguous(), beams.scores.contiguous(), rule == "best",
    )  # fmt: skip
    if device.type == "cpu" and not fixed_size:
        used = int(counts.max()) if batch else 1
        tokens, parents, depths = tokens[:, :used], parents[:, :used], depths[:, :used]
        masks = masks[:, :used, : mask_words(used)]
    return Tree(tokens, parents, depths, counts), masks


def _most(beams: Beams, num_nodes: int | None) -> int:
    """Columns that hold every tree of such a draft, the root's included."""
    kept = beams.draft_length * beams.beam_width
    return 1 + (kept if num_nodes is None else min(num_nodes, kept))


def _padded(tree: Tree, masks: Tensor, columns: int) -> tuple[Tree, Tensor]:
    """The same trees with more padding: a padding row has parent -1 and sees itself alone."""
    batch, have = tree.tokens.shape
    device = tree.tokens.device
    words = mask_words(columns)
    out = Tree(
        tokens=torch.zeros(batch, columns, dtype=torch.int64, device=device),
        parents=torch.full((batch, columns), NO_PARENT, dtype=torch.int64, device=device),
        depths=torch.zeros(batch, columns, dtype=torch.int64, device=device),
        num_nodes=tree.num_nodes,
    )
    out.tokens[:, :have] = tree.tokens
    out.parents[:, :have] = tree.parents
    out.depths[:, :have] = tree.depths
    wide = pack_bits(torch.eye(columns, dtype=torch.bool)).to(device).repeat(batch, 1, 1)
    wide[:, :have] = 0
    wide[:, :have, : min(words, masks.shape[2])] = masks[:, :, :words]
    return out, wide


def _twin(beams: Beams, rule: TreeRule, num_nodes: int | None) -> tuple[Tree, Tensor]:
    """The twin works on the CPU; its tree goes back to where the beams are."""
    device = beams.tokens.device
    here = Beams(**{name: tensor.cpu() for name, tensor in vars(beams).items()})
    tree = twin.build_tree(here, rule, num_nodes)
    masks = tree.packed_mask().to(device)
    return Tree(**{name: tensor.to(device) for name, tensor in vars(tree).items()}), masks


if compiled_available():

    @torch.library.register_fake("redrafter::build_tree")
    def _(out_tokens: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""
