# SPDX-License-Identifier: Apache-2.0
"""The exact walk: one definition, one batched form, and cases recorded elsewhere."""

import random

import pytest
import torch

from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import walk_greedy, walk_one


def walk_by_recursion(tokens, parents, target, at=0):
    """The definition: step to the child that holds the target's token, as long as there is one."""
    for node in range(len(tokens)):
        if parents[node] == at and tokens[node] == target[at]:
            return [node, *walk_by_recursion(tokens, parents, target, node)]
    return []


def random_case(source, most_nodes=20, vocab=4):
    """Siblings hold distinct tokens, as in every tree of ours."""
    tokens, parents = [source.randrange(vocab)], [-1]
    for _ in range(source.randint(0, most_nodes)):
        parent = source.randrange(len(tokens))
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        free = sorted(set(range(vocab)) - taken)
        if free:
            tokens.append(source.choice(free))
            parents.append(parent)
    return tokens, parents, [source.randrange(vocab) for _ in tokens]


def test_random_trees_against_the_definition():
    source = random.Random(0)
    lengths = []
    for _ in range(300):
        tokens, parents, target = random_case(source)
        path = walk_one(tokens, parents, target)
        assert path == walk_by_recursion(tokens, parents, target)
        lengths.append(len(path))
    assert max(lengths) >= 4 and min(lengths) == 0


def test_the_batched_form_on_ragged_trees():
    source = random.Random(1)
    cases = [random_case(source) for _ in range(64)]
    tree = Tree.from_lists([c[0] for c in cases], [c[1] for c in cases])
    target = torch.zeros_like(tree.tokens)
    for row, (_, _, tokens) in zip(target, cases, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    walk = walk_greedy(tree, target)
    for b, (tokens, parents, wanted) in enumerate(cases):
        path = walk_one(tokens, parents, wanted)
        assert walk.num_accepted[b] == len(path)
        assert walk.path[b].tolist() == path + [-1] * (walk.path.shape[1] - len(path))
        last = path[-1] if path else 0
        assert walk.last_node[b] == last
        assert walk.next_token[b] == wanted[last]


def test_nothing_drafted():
    tree = Tree.from_lists([[7]], [[-1]])
    walk = walk_greedy(tree, torch.tensor([[3]]))
    assert walk.path.shape == (1, 0)
    assert (walk.num_accepted.item(), walk.last_node.item(), walk.next_token.item()) == (0, 0, 3)


def test_padding_is_not_read():
    tree = Tree.from_lists([[7, 1, 2], [7]], [[-1, 0, 1], [-1]])
    # Were padding read, node 1 of row 1 (token 0, the target's) would be accepted.
    walk = walk_greedy(tree, torch.tensor([[1, 2, 9], [0, 0, 0]]))
    assert walk.num_accepted.tolist() == [2, 0]
    assert walk.next_token.tolist() == [9, 0]


@pytest.mark.parametrize("batched", [False, True])
def test_sglang_verify_tree_greedy(batched):
    """SGLang, test_eagle_utils.py::test_verify_tree_greedy, its lists written as parents."""
    tokens = [[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]]
    parents = [[-1, 0, 1, 0, 3, 4], [-1, 0, 1, 2, 0, 4]]
    target = [[3, 18, 18, 4, 5, 18], [11, 18, 18, 18, 12, 18]]
    # Its accept_index [0, 3, 4, 5] and [6, 10, 11]: flat, the root first.
    accepted = [[3, 4, 5], [4, 5]]
    if batched:
        walk = walk_greedy(Tree.from_lists(tokens, parents), torch.tensor(target))
        assert walk.path.tolist() == [[3, 4, 5], [4, 5, -1]]
        assert walk.num_accepted.tolist() == [3, 2]
        assert walk.next_token.tolist() == [18, 18]
        return
    for row in range(2):
        path = walk_one(tokens[row], parents[row], target[row])
        assert path == accepted[row]
        assert [target[row][node] for node in [0, *path]] == [[3, 4, 5, 18], [11, 12, 18]][row]
