# SPDX-License-Identifier: Apache-2.0
"""A small shape or two of every kernel, each compared with its twin or float64.

A case calls one operator of ``PtxOperators`` and raises AssertionError where a result is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import beam_cases
import candidate_cases
import draft_cases
import lookup_cases
import torch
from paged_cases import attention_case, by_strides
from tree_cases import random_beams, random_walk_case

from vllm_redrafter.ops import reference
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.tree.build import build_tree

CPU = torch.device("cpu")


def _same(found: object, wanted: object) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def _poisoned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.full_like(tensor, -77) for tensor in tensors]


def attention(operators, dtype=torch.bfloat16, contexts=(100,), rows=(12,), table=0, **shape):
    torch.manual_seed(0)
    case = by_strides(
        attention_case(dtype, list(contexts), list(rows), **{"block_size": 16, **shape}),
        interleaved=True,
    )
    if table:  # room for more keys than there are: more pieces, some of them empty
        wide = torch.full((case.block_table.shape[0], table), -1, dtype=torch.int32)
        wide[:, : case.block_table.shape[1]] = case.block_table
        case = case.but(block_table=wide)
    out = torch.full(case.query.shape, 77.0, dtype=dtype)
    operators.tree_attention(out, *case.args())
    exact, size = case.exact()
    covered = case.covered()
    eps = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * 1.05
    assert ((out.double() - exact).abs() <= eps * size + 1e-6)[covered].all()
    assert (out[~covered] == 77).all()


def beam_step(operators, shape, special="none", top_k=0):
    inputs = beam_cases.beam_case(*shape, special, seed=2)
    ids = torch.randperm(shape[3]) + 1000
    found = beam_cases.run(operators.beam_step, CPU, inputs, ids, top_k)
    beam_cases.assert_like_the_twin(
        found, beam_cases.run(reference.beam_step, CPU, inputs, ids, top_k)
    )


def tree_of_beams(operators, rule):
    beams = random_beams(2, 5, 8, 40, seed=3)
    wanted = build_tree(beams, rule, num_nodes=20)
    tree = (wanted.tokens, wanted.parents, wanted.depths, wanted.packed_mask(), wanted.num_nodes)
    found = _poisoned(*tree)
    operators.build_tree(*found, beams.root, beams.tokens, beams.parents, beams.scores,
                         rule == "best")  # fmt: skip
    _same(found, tree)


def merged_candidates(operators):
    _, beams, chains = candidate_cases.random_drafts(1, 2, 4, 6, 3, 7, 12)
    sources = (beams.tokens, beams.parents, beams.scores, chains.tokens, chains.scores,
               torch.tensor([3, 9]))  # fmt: skip
    shape = (2, 24)
    wanted = [*(torch.zeros(shape, dtype=torch.int64) for _ in range(3)), torch.zeros(shape),
              torch.zeros(shape, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]  # fmt: skip
    found = _poisoned(*wanted)
    torch.ops.redrafter.merge_candidates(*wanted, *sources)
    operators.merge_candidates(*found, *sources)
    _same(found, wanted)


def chosen_tree(operators):
    root, beams, chains = candidate_cases.random_drafts(1, 2, 4, 6, 3, 7, 12)
    shape = (2, 40)
    given = [*(torch.zeros(shape, dtype=torch.int64) for _ in range(3)), torch.zeros(shape),
             torch.zeros(shape, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]  # fmt: skip
    torch.ops.redrafter.merge_candidates(
        *given, beams.tokens, beams.parents, beams.scores, chains.tokens, chains.scores, None
    )
    counts = torch.tensor([9, 40])
    inputs = (root, *given[:3], given[5], counts)
    wanted = [*(torch.zeros(2, 41, dtype=torch.int64) for _ in range(3)),
              torch.zeros(2, 41, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64),
              torch.zeros(2, 41, dtype=torch.int64)]  # fmt: skip
    found = _poisoned(*wanted)
    torch.ops.redrafter.choose_tree(*wanted, *inputs)
    operators.choose_tree(*found, *inputs)
    _same(found, wanted)


def walk(operators):
    tree, target = random_walk_case(5, 40, depth_bias=0.7, seed=1, vocab=4)
    wanted = [torch.zeros(5, 9, dtype=torch.int64),
              *(torch.zeros(5, dtype=torch.int64) for _ in range(3))]  # fmt: skip
    found = _poisoned(*wanted)
    inputs = (tree.tokens, tree.parents, tree.num_nodes, target)
    reference.walk(*wanted, *inputs)
    operators.walk(*found, *inputs)
    _same(found, wanted)


def suffix_lookup(operators):
    batch = lookup_cases.random_batch(3, 4, 300, 5, seed=1)
    wanted, found = (lookup_cases.outputs(3, 4, 9) for _ in range(2))
    for run, out in ((torch.ops.redrafter, wanted), (operators, found)):
        run.suffix_lookup(out.tokens, out.matched, out.scores, *batch, 40, 12)
    lookup_cases.assert_same(found, wanted, rtol=3e-7)


def move_kv(operators):
    torch.manual_seed(0)
    caches = [torch.randint(0, 256, (4, 16, 3, 256), dtype=torch.uint8) for _ in range(4)]
    split = [cache.view(torch.bfloat16).transpose(1, 2).split(64, -1) for cache in caches]
    there, wanted = split[:2], split[2:]
    for one, other in zip(caches[:2], caches[2:], strict=True):
        other.copy_(one)
    src, dst = torch.tensor([20, 23, 25, 63, -1, 9]), torch.tensor([21, 22, 23, 20, 5, 8])
    reference.move_kv([k for k, _ in wanted], [v for _, v in wanted], None, None, src, dst)
    mover = MoveKV([k for k, _ in there], [v for _, v in there])
    operators.move_kv(mover.table, None, None, src, dst, mover.block_size, mover.head_dim,
                      mover.element_size)  # fmt: skip
    _same(caches[:2], caches[2:])


def draft(operators, rnn, exit_dim):
    from test_cuda_draft import compare

    drafter = draft_cases.make_drafter(vocab=300, hidden=64, exit_dim=exit_dim, blocks=1, rnn=rnn)
    assert compare((operators, CPU), drafter, batch=2, width=4, length=3) == (2, 2)


# name -> (source, case)
CASES: dict[str, tuple[str, Callable]] = {
    "attention, 12 rows, 112 keys": ("tree_attention", functools.partial(
        attention, head_dim=128, kv_heads=1, group=4)),
    "attention, 12 rows, 712 keys in 2 pieces": ("tree_attention", functools.partial(
        attention, contexts=(700,), head_dim=128, kv_heads=1, group=4)),
    "attention, 2 requests, pieces without keys": ("tree_attention", functools.partial(
        attention, contexts=(300, 5), rows=(20, 1), head_dim=64, kv_heads=1, group=4, table=128)),
    "attention, heads of 256, float16": ("tree_attention", functools.partial(
        attention, dtype=torch.float16, rows=(5,), contexts=(20,), head_dim=256, kv_heads=1,
        group=2)),
    "attention, float32": ("tree_attention", functools.partial(
        attention, dtype=torch.float32, rows=(5,), contexts=(300,), head_dim=64, kv_heads=1,
        group=2)),
    "beam step, 8 beams, 2048 tokens": ("beam_step", functools.partial(
        beam_step, shape=(1, 8, False, 2048, torch.bfloat16))),
    "beam step, top 50": ("beam_step", functools.partial(
        beam_step, shape=(1, 4, False, 1500, torch.float32), top_k=50)),
    "beam step, by definition": ("beam_step", functools.partial(
        beam_step, shape=(3, 3, False, 300, torch.float32), special="low scores")),
    "best tree": ("build_tree", functools.partial(tree_of_beams, rule="best")),
    "tree of beams": ("build_tree", functools.partial(tree_of_beams, rule="beams")),
    "merged candidates": ("candidates", merged_candidates),
    "chosen tree": ("candidates", chosen_tree),
    "walk": ("walk", walk),
    "suffix lookup": ("suffix_lookup", suffix_lookup),
    "moves": ("move_kv", move_kv),
    "draft with a cell": ("draft", functools.partial(draft, rnn=True, exit_dim=128)),
    "draft without a cell": ("draft", functools.partial(draft, rnn=False, exit_dim=48)),
}  # fmt: skip
