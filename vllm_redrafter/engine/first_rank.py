# SPDX-License-Identifier: Apache-2.0
"""With tensor parallelism, every rank verifies the tree that the first rank drafted.

vLLM's scheduler sees the first rank's tokens only, and a rank that knew another tree would mask
and place the same tokens differently: outputs would be wrong without an error. Sampled tokens are
alike on all ranks, because all sample from the same gathered logits with the same seeds. Hidden
states need not be: vLLM's shared-memory all-reduce for CPUs adds float32 numbers in an order of
each rank's own, which from three ranks on rounds differently. So a draft is never trusted to come
out alike.

Each rank still holds the whole drafter and drafts. The first rank needs that room and time anyway,
the KV cache is as large as the fullest rank allows, and the others would only wait; in return the
counter ``replaced`` says how often drafts really differed. Dividing the drafter is left out until
it is measured. Computed, for a hidden size of 4,096, two blocks and 32,000 head rows in bfloat16: a
depth reads 464 MB, and two ranks with half of it each would save about 80 us of 155 at 3 TB/s, but
wait for each other some five times per depth. The message here is one per step: 5 KB for 8 requests
of 15 nodes.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from vllm_redrafter.tree.tree import Tree

Drafted = TypeVar("Drafted")


def several_ranks() -> bool:
    """Whether there are other ranks to agree with."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().world_size > 1


def is_first_rank() -> bool:
    """Whether this rank's trees are the ones that all verify."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().is_first_rank


def first_ranks_object(drafted: Drafted) -> Drafted:
    """What the first rank passed; all ranks must call together."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return group.broadcast_object(drafted if group.is_first_rank else None)


def first_ranks_trees(
    tree: Tree, masks: Tensor, sources: Tensor
) -> tuple[Tree, Tensor, Tensor]:
    """The trees that the first rank passed, in one message; nothing is read by the host.

    All ranks must call together, with trees of one size.

    Args:
        tree: of M columns.
        masks: ``[B, M, words]`` int64.
        sources: ``[B, M]`` int64, who drafted every node.
    """
    from vllm.distributed.parallel_state import get_tp_group

    batch, columns = tree.tokens.shape
    parts = [tree.tokens, tree.parents, tree.depths, sources, tree.num_nodes[:, None]]
    parts.append(masks.flatten(1))
    message = get_tp_group().broadcast(torch.cat(parts, 1))
    widths = [part.shape[1] for part in parts]
    tokens, parents, depths, sources, num_nodes, flat = message.split(widths, 1)
    tree = Tree(tokens, parents, depths, num_nodes[:, 0])
    return tree, flat.view(batch, columns, -1), sources


def differ(tree: Tree, other: Tree) -> Tensor:
    """``[B]`` bool, whose trees are not the same; padding counts."""
    return ((tree.tokens != other.tokens) | (tree.parents != other.parents)).any(1)
