# SPDX-License-Identifier: Apache-2.0
"""Small operators, of which a step needs one call each: compiled, and as twins."""

from __future__ import annotations

import pytest
import torch

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.lookup.suffix import suffix_lookup as twin_suffix_lookup
from vllm_redrafter.ops import reference
from vllm_redrafter.ops.argmax_rows import argmax_rows
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.candidates import choose_tree, merge_candidates
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.ops.suffix_lookup import suffix_lookup
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree import candidates as twin_candidates
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
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_candidates(compare, batch, cold):
    """Beams of 3 x 4 and 4 chains of 16 to the 31 likeliest paths, and those to trees."""
    beams = random_beams(batch, 3, 4)
    tokens = torch.randint(8192, (batch, 4, 16))
    tokens[:, 0, :3] = beams.sequences()[:, 0, 1:]  # one chain goes where the best beam goes
    chains = Chains(tokens, torch.ones(batch, 4), -torch.rand(batch, 4, 16).cumsum(-1))
    counts = torch.full((batch,), 31)

    def compiled() -> None:
        choose_tree(merge_candidates(beams.root, beams, chains, 31), counts)

    def twin() -> None:
        found = twin_candidates.merge_candidates(beams.root, beams, chains, 31)
        twin_candidates.choose_tree(found, counts)[0].packed_mask()

    compare(compiled, {"twin": twin}, NEGLIGIBLE, cold)


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


@COLD
@pytest.mark.parametrize("rows", [1, 32])
def test_argmax_rows(compare, rows, cold):
    """Every third row of logits of a vocabulary of 49,152, as vLLM's sampler takes it."""
    logits, wanted = torch.randn(3 * rows, 49152).bfloat16(), torch.arange(0, 3 * rows, 3)
    compare(
        lambda: argmax_rows(logits, wanted),
        {"torch": lambda: logits[wanted].to(torch.float32).argmax(-1)},
        NEGLIGIBLE,
        cold,
    )


@COLD
@pytest.mark.parametrize("requests", [1, 32])
@pytest.mark.parametrize("length", [2_000, 32_000, 131_072])
@pytest.mark.parametrize("last", ["rare", "natural"])
def test_suffix_lookup(compare, requests, length, last, cold):
    """rare: the whole text is searched, in vain. natural: by Zipf's law, like the text before."""
    torch.manual_seed(1)
    frequency = 1 / (torch.arange(49152) + 2.7)
    text = torch.multinomial(frequency, requests * length, replacement=True).int()
    text = text.view(requests, length)
    if last == "rare":
        text[:, -1] = 49152
    elif requests == 1:  # not left to chance: half of all tokens are more frequent ones
        text[:, -1] = int((frequency.cumsum(0) < frequency.sum() / 2).sum())
    slots = torch.arange(requests, dtype=torch.int32)
    starts = torch.zeros_like(slots)
    batch = (text, slots, starts, starts + length)
    # Between warm calls the twin's lists would throw the text out of the caches.
    compare(
        lambda: suffix_lookup(*batch),
        {"twin": lambda: twin_suffix_lookup(*batch)} if requests == 1 and cold else {},
        NEGLIGIBLE if requests == 1 else {},
        cold,
    )
