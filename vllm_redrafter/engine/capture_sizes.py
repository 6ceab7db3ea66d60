# SPDX-License-Identifier: Apache-2.0
"""For how many query rows CUDA graphs are captured, when the user has not said so.

vLLM stops at 512 rows: 15 requests with trees of 32 nodes. And a full graph serves a step only if
its rows are the requests' times the rows of a tree, so sizes are multiples of those.
"""

from __future__ import annotations

from vllm_redrafter.options import ReDrafterOptions

# With more requests than this a step of trees is so long that launching its kernels one by one
# hardly shows (computed for 7B targets, not measured).
MOST_REQUESTS = 64

# vLLM's own sizes, which steps with prompts in them are padded to (config/vllm.py, 0.32).
VLLM_CEILING = 512


def capture_sizes(
    options: ReDrafterOptions, max_requests: int | None, max_rows: int | None
) -> list[int]:
    """Ascending sizes, in query rows.

    Args:
        options: how many nodes are drafted, by how many requests are running.
        max_requests: vLLM's ``max_num_seqs``; None if it is left to vLLM.
        max_rows: vLLM's ``max_num_batched_tokens``; None if it is left to vLLM.
    """
    tree_rows = options.tree_rows(max_requests or MOST_REQUESTS)
    most = min(len(tree_rows), MOST_REQUESTS)
    counts = {1, 2, 4, *range(8, most, 8), most}
    sizes = {count * tree_rows[count - 1] for count in counts if count <= most}
    ceiling = VLLM_CEILING
    if max_requests is not None:
        # Twice the widest step, as vLLM does: more rows than that are a prompt's.
        ceiling = min(ceiling, 2 * max_requests * max(tree_rows))
    sizes |= {1, 2, 4, *range(8, min(ceiling + 1, 256), 8), *range(256, ceiling + 1, 16)}
    return sorted(size for size in sizes if max_rows is None or size <= max_rows)
