# SPDX-License-Identifier: Apache-2.0
"""Both tree rules against brute force over explicit paths."""

import pytest
import torch

from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams
from vllm_redrafter.tree.build import build_tree
from vllm_redrafter.tree.rules import TREE_RULES


def random_beams(seed, batch=3, width=4, length=4, vocab=6, fillers=False):
    """What a beam search keeps: random laws, the best W of all continuations at every depth."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents, scores = [], [], []
    score = torch.full((batch, width), FILLER_SCORE)
    score[:, 0] = 0
    for _ in range(length):
        logits = 2 * torch.randn(batch, width, vocab, generator=generator)
        if fillers:  # a renormalised top 2: all else is a filler
            bound = logits.topk(2).values[..., -1:]
            logits = logits.masked_fill(logits < bound, FILLER_SCORE)
        total = (score[:, :, None] + logits.log_softmax(-1)).flatten(1)
        score, flat = total.sort(descending=True, stable=True)
        score, flat = score[:, :width], flat[:, :width]
        tokens.append(flat % vocab)
        parents.append(flat // vocab)
        scores.append(score)
    root = torch.randint(0, vocab, (batch,), generator=generator)
    return Beams(root, torch.stack(tokens, 1), torch.stack(parents, 1), torch.stack(scores, 1))


def candidates(beams, b):
    """{path of tokens below the root: score} of everything that was kept and is no filler."""
    found = {}
    paths = [()] * beams.beam_width
    for depth in range(beams.draft_length):
        parents = beams.parents[b, depth].tolist()
        tokens = beams.tokens[b, depth].tolist()
        paths = [(*paths[p], t) for p, t in zip(parents, tokens, strict=True)]
        for path, score in zip(paths, beams.scores[b, depth].tolist(), strict=True):
            if score > FILLER_SCORE / 2:
                found[path] = score
    return found


def paths_of(tree, b):
    """Every node's path of tokens, in the order of nodes, without the root."""
    paths = [()]
    for node in range(1, int(tree.num_nodes[b])):
        paths.append((*paths[int(tree.parents[b, node])], int(tree.tokens[b, node])))
    return paths[1:]


@pytest.mark.parametrize("fillers", [False, True])
@pytest.mark.parametrize("limit", [None, 0, 1, 3, 7, 100])
@pytest.mark.parametrize("seed", range(4))
def test_best_takes_the_likeliest_candidates(seed, limit, fillers):
    beams = random_beams(seed, fillers=fillers)
    tree = build_tree(beams, "best", limit)
    for b in range(beams.batch_size):
        found = candidates(beams, b)
        likeliest = sorted(found, key=lambda path: -found[path])[:limit]
        paths = paths_of(tree, b)
        assert len(paths) == len(set(paths))
        assert set(paths) == set(likeliest)


@pytest.mark.parametrize("seed", range(6))
def test_best_is_closed_and_starts_with_the_best_chain(seed):
    beams = random_beams(seed, width=6, length=5)
    for limit in (1, 4, 9, 20):
        tree = build_tree(beams, "best", limit)
        for b in range(beams.batch_size):
            found, paths = candidates(beams, b), paths_of(tree, b)
            for path in paths:
                assert len(path) == 1 or path[:-1] in paths
            # From the root always the likeliest child that was chosen.
            chain = ()
            while children := [p for p in paths if len(p) == len(chain) + 1 and p[:-1] == chain]:
                chain = max(children, key=found.__getitem__)
            assert paths[: len(chain)] == [chain[: i + 1] for i in range(len(chain))]
            # The rest comes best first.
            rest = [found[path] for path in paths[len(chain) :]]
            assert rest == sorted(rest, reverse=True)


@pytest.mark.parametrize("limit", [None, 0, 1, 3, 7, 100])
@pytest.mark.parametrize("seed", range(4))
def test_beams_are_the_prefixes_in_order(seed, limit):
    beams = random_beams(seed)
    tree = build_tree(beams, "beams", limit)
    for b in range(beams.batch_size):
        prefixes = [
            tuple(beam[1 : depth + 1])
            for beam in beams.sequences()[b].tolist()
            for depth in range(1, len(beam))
        ]
        assert paths_of(tree, b) == list(dict.fromkeys(prefixes))[:limit]


@pytest.mark.parametrize("rule", TREE_RULES)
def test_every_prefix_of_the_nodes_is_a_tree(rule):
    for seed in range(4):
        tree = build_tree(random_beams(seed, width=5), rule)
        for parents, count in zip(tree.parents.tolist(), tree.num_nodes.tolist(), strict=True):
            assert parents[0] == -1
            assert all(0 <= parents[node] < node for node in range(1, count))
            # The best beam first.
            assert parents[1:3] == [0, 1]


@pytest.mark.parametrize("rule", TREE_RULES)
def test_siblings_hold_distinct_tokens(rule):
    for seed in range(4):
        tree = build_tree(random_beams(seed, width=6), rule)
        for b in range(3):
            edges = list(zip(tree.parents[b].tolist(), tree.tokens[b].tolist(), strict=True))
            edges = edges[1 : int(tree.num_nodes[b])]
            assert len(edges) == len(set(edges))


def test_sizes_may_differ_per_request():
    beams = random_beams(0, batch=2)
    chains = beams.scores.clone()
    chains[1, :, 1:] = FILLER_SCORE  # the second request has one real beam
    parents = beams.parents.clone()
    parents[1, :, 0] = 0
    tree = build_tree(Beams(beams.root, beams.tokens, parents, chains), "best", 10)
    assert tree.num_nodes.tolist() == [11, 5]
    assert tree.parents[1, :5].tolist() == [-1, 0, 1, 2, 3]


def test_ties_take_the_lower_depth():
    """A child of probability 1 scores as its parent does and must not come without it."""
    scores = torch.tensor([[[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]]])
    tokens = torch.tensor([[[1, 2], [3, 4], [5, 6]]])
    parents = torch.tensor([[[0, 0], [0, 1], [0, 1]]])
    beams = Beams(torch.tensor([9]), tokens, parents, scores)
    for limit in range(1, 7):
        paths = paths_of(build_tree(beams, "best", limit), 0)
        assert paths == [(1,), (1, 3), (1, 3, 5), (2,), (2, 4), (2, 4, 6)][:limit]


def test_bad_arguments():
    beams = random_beams(0)
    with pytest.raises(ValueError, match="tree is 'widest'; it must be one of best, beams."):
        build_tree(beams, "widest")
    with pytest.raises(ValueError, match="num_nodes is -1; it must be 0 or more."):
        build_tree(beams, "best", -1)
