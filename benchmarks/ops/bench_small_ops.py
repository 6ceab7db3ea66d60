# SPDX-License-Identifier: Apache-2.0
"""move_kv, build_tree and walk: what one step pays for them, compiled and as twins."""

from __future__ import annotations

import pytest
import torch

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.ops import reference
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.build import build_tree as twin_build_tree
from vllm_redrafter.tree.walk import walk_greedy

COLD = pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
# One per cent of plain vLLM's step for SmolLM2-135M (README, "Speed"): negligible.
NEGLIGIBLE = {"ms": 0.31}


def vector_maps(block_size: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    token, feature = torch.arange(block_size)[:, None], torch.arange(head_dim)
    return (
        (feature * block_size + token).flatten().int(),
        (token * head_dim + feature).flatten().int(),
    )


@COLD
@pytest.mark.parametrize(
    ("requests", "layers", "heads", "dim"),
    [(1, 30, 3, 64), (8, 30, 3, 64), (1, 32, 8, 128)],
    ids=["smollm2", "smollm2_batch8", "llama8b"],
)
def test_move_kv(compare, requests, layers, heads, dim, cold):
    maps = vector_maps(128, dim)
    caches = [
        torch.randn(2 * requests, heads, 256, dim).bfloat16().chunk(2, dim=2) for _ in range(layers)
    ]
    keys, values = [key for key, _ in caches], [value for _, value in caches]
    # Every request accepts nodes 1, 4 and 7: two rows move.
    base = torch.arange(requests)[:, None] * 256 + 40
    src, dst = (base + torch.tensor([4, 7])).flatten(), (base + torch.tensor([2, 3])).flatten()
    mover = MoveKV(keys, values, *maps)
    compare(
        lambda: mover(src, dst),
        {"twin": lambda: reference.move_kv(keys, values, *maps, src, dst)},
        NEGLIGIBLE if dim == 64 else {},
        cold,
        layers=layers,
    )


def random_beams(batch: int, length: int, width: int) -> Beams:
    shape = (batch, length, width)
    scores = (torch.rand(shape).sort(dim=-1, descending=True).values * -3).cumsum(1)
    return Beams(
        torch.zeros(batch, dtype=torch.int64),
        torch.randint(8192, shape),
        torch.arange(width).expand(shape) // 2,
        scores.sort(dim=-1, descending=True).values,
    )


SIZES = pytest.mark.parametrize(
    ("batch", "length", "width", "nodes"), [(1, 3, 4, 11), (8, 3, 4, 11), (1, 4, 16, 63)]
)


@COLD
@SIZES
@pytest.mark.parametrize("rule", ["best", "beams"])
def test_build_tree(compare, rule, batch, length, width, nodes, cold):
    beams = random_beams(batch, length, width)
    compare(
        lambda: build_tree(beams, rule, nodes),
        {"twin": lambda: twin_build_tree(beams, rule, nodes).packed_mask()},
        NEGLIGIBLE,
        cold,
    )


@COLD
@SIZES
def test_walk(compare, batch, length, width, nodes, cold):
    tree = twin_build_tree(random_beams(batch, length, width), "best", nodes)
    # The target agrees with the last node of each tree and with all that lead there.
    target = torch.zeros_like(tree.tokens)
    for b in range(batch):
        node = int(tree.num_nodes[b]) - 1
        while node > 0:
            parent = int(tree.parents[b, node])
            target[b, parent] = tree.tokens[b, node]
            node = parent
    compare(
        lambda: walk(tree, target),
        {"twin": lambda: walk_greedy(tree, target)},
        NEGLIGIBLE,
        cold,
    )
