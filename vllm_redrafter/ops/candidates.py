# SPDX-License-Identifier: Apache-2.0
"""Drafts of several sources to one list of candidates, and its likeliest ones to a tree."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.ops.library import compiled_available, has_kernel
from vllm_redrafter.tree import candidates as twin
from vllm_redrafter.tree.candidates import Candidates
from vllm_redrafter.tree.tree import Tree, mask_words


def merge_candidates(
    root: Tensor,
    beams: Beams | None,
    chains: Chains | None,
    most: int,
    max_depth: Tensor | None = None,
) -> Candidates:
    """``vllm_redrafter.tree.candidates.merge_candidates`` in one compiled call.

    All numbers are those of the twin, padding included. No size depends on what was drafted and
    nothing is read back, so that on CUDA a call can be captured in a CUDA graph.

    Args:
        root: ``[B]`` int64, the known tokens. All tensors are on its device, of any strides.
        beams: the drafter's; None for none.
        chains: the lookup's; None for none.
        most: M >= 0 columns.
        max_depth: ``[B]`` int64, deeper paths are left out; None for no limit.

    Returns:
        Candidates of M columns.

    Raises:
        ValueError: ``most`` below 0.
        RuntimeError: inputs that no search leaves (compiled operator, on the CPU): a beam's parent
            outside the beam width; a path among the first M that scores higher than the path it
            extends, or that extends one without a score. On CUDA any such path is left out, with
            all that extends it, and the next ones take its place.
    """
    device = root.device
    if most < 0 or not has_kernel(device):
        return _merge_twin(root, beams, chains, most, max_depth)
    batch = root.shape[0]
    tokens, parents, depths, sources = torch.empty(
        4, batch, most, dtype=torch.int64, device=device
    ).unbind()
    scores = torch.empty(batch, most, device=device)
    counts = torch.empty(batch, dtype=torch.int64, device=device)
    from_beams = (None,) * 3 if beams is None else (beams.tokens, beams.parents, beams.scores)
    from_chains = (None,) * 2 if chains is None else (chains.tokens, chains.scores)
    torch.ops.redrafter.merge_candidates.default(
        tokens, parents, depths, scores, sources, counts,
        *(None if part is None else part.contiguous() for part in (*from_beams, *from_chains)),
        None if max_depth is None else max_depth.contiguous(),
    )  # fmt: skip
    return Candidates(root, tokens, parents, depths, scores, sources, counts)


def choose_tree(candidates: Candidates, counts: Tensor) -> tuple[Tree, Tensor, Tensor]:
    """``vllm_redrafter.tree.candidates.choose_tree`` and its ``Tree.packed_mask`` in one call.

    All integers are those of the twin, padding included; sizes are as fixed as those above.

    Args:
        candidates: all tensors on one device, of any strides.
        counts: ``[B]`` int64, at least 0; a request has no more than it has candidates.

    Returns:
        tree: of M + 1 columns, node 0 the known token, the best chain first.
        masks: ``[B, M + 1, ceil((M + 1) / 64)]`` int64, bit j % 64 of word j // 64 of row i is set
            iff node j is node i or its ancestor; a padding row sees itself alone.
        chosen: ``[B, M + 1]`` int64, the candidate that every node was; -1 for root and padding.

    Raises:
        RuntimeError: a candidate before its parent (compiled operator, on the CPU). On CUDA it is
            left out, with all that hangs on it.
    """
    device = candidates.tokens.device
    if not has_kernel(device):
        return _choose_twin(candidates, counts)
    batch, most = candidates.tokens.shape
    columns = most + 1
    tokens, parents, depths, chosen = torch.empty(
        4, batch, columns, dtype=torch.int64, device=device
    ).unbind()
    masks = torch.empty(batch, columns, mask_words(columns), dtype=torch.int64, device=device)
    num_nodes = torch.empty(batch, dtype=torch.int64, device=device)
    torch.ops.redrafter.choose_tree.default(
        tokens, parents, depths, masks, num_nodes, chosen, candidates.root.contiguous(),
        candidates.tokens.contiguous(), candidates.parents.contiguous(),
        candidates.depths.contiguous(), candidates.counts.contiguous(), counts.contiguous(),
    )  # fmt: skip
    return Tree(tokens, parents, depths, num_nodes), masks, chosen


def _merge_twin(
    root: Tensor, beams: Beams | None, chains: Chains | None, most: int, max_depth: Tensor | None
) -> Candidates:
    """The twin works on the CPU; what it gives goes back to where the root is."""
    here_beams = beams and Beams(**{name: part.cpu() for name, part in vars(beams).items()})
    here_chains = chains and Chains(**{name: part.cpu() for name, part in vars(chains).items()})
    here_depth = None if max_depth is None else max_depth.cpu()
    found = twin.merge_candidates(root.cpu(), here_beams, here_chains, most, here_depth)
    return Candidates(**{name: part.to(root.device) for name, part in vars(found).items()})


def _choose_twin(candidates: Candidates, counts: Tensor) -> tuple[Tree, Tensor, Tensor]:
    device = candidates.tokens.device
    here = Candidates(**{name: part.cpu() for name, part in vars(candidates).items()})
    tree, chosen = twin.choose_tree(here, counts.cpu())
    there = Tree(**{name: part.to(device) for name, part in vars(tree).items()})
    return there, tree.packed_mask().to(device), chosen.to(device)


if compiled_available():

    @torch.library.register_fake("redrafter::merge_candidates")
    def _(out_tokens: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""

    @torch.library.register_fake("redrafter::choose_tree")
    def _(out_tokens: Tensor, *rest: object) -> None:
        """Nothing to compute: the results are written into arguments."""
