# SPDX-License-Identifier: Apache-2.0
"""Negative controls: with one thing broken, the comparison of the other tests must fail."""

import dataclasses

import pytest
import torch
from vllm import SamplingParams

from engine_v1.tiny_target import prompts
from vllm_redrafter.engine.v1 import runner as runner_module
from vllm_redrafter.engine.v1.request_tree import chain_masks
from vllm_redrafter.engine.v1.walk import BatchWalk

GREEDY = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture
def broken(pair, monkeypatch):
    """Run what ``test_greedy`` runs, with the runner's methods replaced."""

    def run(**methods):
        with monkeypatch.context() as patch:
            for name, method in methods.items():
                patch.setattr(pair.trees.runner, name, method)
            return pair.run(prompts(24), GREEDY)

    return run


def test_nothing_broken(broken):
    broken().assert_equal()


def test_mask_off(pair, broken):
    """Every row sees all rows before it, as in a chain."""
    honest = pair.trees.runner._tree_step

    def causal(step):
        tree_step = honest(step)
        masks = torch.zeros_like(tree_step.masks)
        for start, count in zip(tree_step.row_start, tree_step.row_count, strict=True):
            chain = torch.from_numpy(chain_masks(int(count)))
            masks[start : start + count, : chain.shape[1]] = chain
        return dataclasses.replace(tree_step, masks=masks)

    assert not broken(_tree_step=causal).equal


def test_positions_off(broken):
    """A node's position is its slot, not its depth."""
    assert not broken(_set_tree_positions=lambda step: None).equal


def test_kv_move_off(broken):
    assert not broken(_movers=[]).equal


def test_walk_that_takes_the_first_child(broken, monkeypatch):
    monkeypatch.setattr(runner_module, "walk_trees", first_child_walk)
    assert not broken().equal


def first_child_walk(trees, first_row, draw, ends):
    """A wrong rule: whatever was drafted first is accepted."""
    walk = BatchWalk([], [])
    for i, tree in enumerate(trees):
        path = list(range(1, 1 + min(1, len(tree)))) if tree is not None else []
        accepted = [tree.tokens[node - 1] for node in path]
        walk.paths.append(path)
        walk.tokens.append(accepted + draw([i], [first_row[i] + (path[-1] if path else 0)]))
    return walk
