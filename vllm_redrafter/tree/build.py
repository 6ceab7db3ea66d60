# SPDX-License-Identifier: Apache-2.0
"""From the candidates of one draft to the tree that is verified: two rules.

``beams`` is Apple's dynamic tree (arXiv 2403.09919, section 3.3; ``tree_attention.py``): the
distinct prefixes of the surviving beams. ``best`` lets every candidate that was kept at any depth
compete, and takes those with the highest path probability: deep beams then do not crowd out the
alternatives to the first token.

These loops are the definition; ``vllm_redrafter.ops.build_tree`` is the compiled form.
"""

from __future__ import annotations

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
from vllm_redrafter.tree.rules import TREE_RULES, TreeRule
from vllm_redrafter.tree.tree import NO_PARENT, Tree

# Fillers score near FILLER_SCORE; no real path of a served draft length comes near this.
LOWEST_REAL_SCORE = FILLER_SCORE / 2


def build_tree(beams: Beams, rule: TreeRule = "best", num_nodes: int | None = None) -> Tree:
    """Merge one draft into a prefix tree per request.

    Args:
        beams: the draft, on the CPU.
        rule: ``best`` or ``beams``.
        num_nodes: the most nodes a tree may have, not counting the root; None for no limit. Under
            ``beams`` the first ones in Apple's order are kept, under ``best`` the likeliest.

    Returns:
        Tree, node 0 the known token. Sizes may differ per request.

    Raises:
        ValueError: an unknown rule, or ``num_nodes`` below 0.
    """
    if rule not in TREE_RULES:
        raise ValueError(f"tree is {rule!r}; it must be one of {', '.join(TREE_RULES)}.")
    if num_nodes is not None and num_nodes < 0:
        raise ValueError(f"num_nodes is {num_nodes}; it must be 0 or more.")
    one_request = _beams_tree if rule == "beams" else _best_tree
    rows = [one_request(beams, b, num_nodes) for b in range(beams.batch_size)]
    return Tree.from_lists([tokens for tokens, _ in rows], [parents for _, parents in rows])


def _beams_tree(beams: Beams, b: int, limit: int | None) -> tuple[list[int], list[int]]:
    """Walk the beams best first; a prefix met for the first time is the next node."""
    tokens, parents = [int(beams.root[b])], [NO_PARENT]
    node_of: dict[tuple[int, ...], int] = {}
    for beam in beams.sequences()[b].tolist():
        node = 0
        for depth in range(1, len(beam)):
            prefix = tuple(beam[1 : depth + 1])
            if prefix not in node_of:
                if limit is not None and len(tokens) > limit:
                    return tokens, parents
                node_of[prefix] = len(tokens)
                tokens.append(beam[depth])
                parents.append(node)
            node = node_of[prefix]
    return tokens, parents


def _best_tree(beams: Beams, b: int, limit: int | None) -> tuple[list[int], list[int]]:
    """Take the likeliest candidates of all depths, then put the best chain first."""
    width = beams.beam_width
    scores = beams.scores[b].flatten().tolist()
    parent_of = [
        None if i < width else (i // width - 1) * width + parent
        for i, parent in enumerate(beams.parents[b].flatten().tolist())
    ]
    # A log-probability is never above 0, so a parent never scores below its child, and with ties
    # broken towards the lower depth the best candidates are closed under ancestors.
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen = [i for i in order if scores[i] > LOWEST_REAL_SCORE][:limit]

    chain = best_chain(chosen, parent_of)
    in_chain = set(chain)
    node_of = {candidate: node for node, candidate in enumerate(chain, start=1)}
    for candidate in chosen:
        if candidate not in in_chain:
            node_of[candidate] = len(node_of) + 1
    candidate_tokens = beams.tokens[b].flatten().tolist()
    tokens, parents = [int(beams.root[b])], [NO_PARENT]
    for candidate in node_of:
        tokens.append(candidate_tokens[candidate])
        above = parent_of[candidate]
        parents.append(0 if above is None else node_of[above])
    return tokens, parents


def best_chain(chosen: list[int], parent_of: list[int | None]) -> list[int]:
    """From the root always to the likeliest chosen child; ``chosen`` is best first."""
    chain: list[int] = []
    for candidate in chosen:
        if parent_of[candidate] == (chain[-1] if chain else None):
            chain.append(candidate)
    return chain
