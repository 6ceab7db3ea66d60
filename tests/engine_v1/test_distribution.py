# SPDX-License-Identifier: Apache-2.0
"""Unseeded sampling follows the same law with trees as without.

A target of four tokens is asked for three, thousands of times: 64 possible texts, counted for
plain vLLM and for ReDrafter and compared with a two-sample chi-square test.
"""

import itertools
from collections import Counter

import pytest
import torch
from vllm import SamplingParams

from engine_v1.engines import Pair, engine, tokens
from engine_v1.oracle import request_tree
from engine_v1.tiny_target import tiny_drafter, write_target
from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.engine.v1 import runner as runner_module
from vllm_redrafter.engine.v1.walk import BatchWalk

VOCAB = 4
LENGTH = 3
SAMPLES = 4096
PROMPT = [0, 2, 1, 3, 3]
SIGNIFICANCE = 1e-3


@pytest.fixture(scope="module")
def four_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target = write_target(folder / "target4", vocab=VOCAB, logit_scale=0.6)
    save_drafter(tiny_drafter(vocab=VOCAB), folder / "drafter4")
    common = {"skip_tokenizer_init": True, "max_num_seqs": 64, "max_model_len": 32}
    spec = {"spec_num_speculative_tokens": 12, "spec_beam_width": 4, "spec_draft_length": 3}
    return Pair(engine(target, **common), engine(target, folder / "drafter4", **common, **spec))


def texts(engine_, seed, **sampling):
    """How often each text of three tokens was said."""
    torch.manual_seed(seed)
    params = SamplingParams(temperature=1.0, max_tokens=LENGTH, detokenize=False, **sampling)
    return Counter(map(tuple, tokens(engine_.generate([PROMPT] * SAMPLES, params))))


def same_tree_for_all(runner, drafting, context, known):
    """Tokens 0 and 3 below every node: a rule that favours the draft is off in one direction."""
    tree = request_tree([0, 3, 3, 0, 0, 3], [0, 0, 1, 1, 2, 2])
    return [tree] * len(drafting)


def texts_with_trees(pair, seed, **sampling):
    pair.trees.reset(same_tree_for_all)
    counts = texts(pair.trees, seed, **sampling)
    stats = pair.trees.stats
    assert stats["acceptance_length"] > 1.3, stats
    assert stats["moves"] > 200, stats
    return counts


def p_value(first, second):
    """Of the two-sample chi-square test for samples of equal size, rare texts taken together."""
    cells, rare = [], [0, 0]
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        pair = [first[text], second[text]]
        if sum(pair) < 10:
            rare = [rare[0] + pair[0], rare[1] + pair[1]]
        else:
            cells.append(pair)
    cells += [rare] if sum(rare) else []
    assert len(cells) > 20
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}], ids=["plain", "top_k"])
def test_same_law(four_tokens, sampling):
    four_tokens.plain.reset()
    plain = texts(four_tokens.plain, 1, **sampling)
    assert p_value(plain, texts_with_trees(four_tokens, 2, **sampling)) > SIGNIFICANCE


def test_the_test_accepts_plain_against_plain(four_tokens):
    four_tokens.plain.reset()
    assert p_value(texts(four_tokens.plain, 1), texts(four_tokens.plain, 3)) > SIGNIFICANCE


def test_a_wrong_rule_fails(four_tokens, monkeypatch):
    monkeypatch.setattr(runner_module, "walk_trees", second_chance_walk)
    four_tokens.plain.reset()
    plain = texts(four_tokens.plain, 1)
    assert p_value(plain, texts_with_trees(four_tokens, 2)) < SIGNIFICANCE


def second_chance_walk(trees, first_row, draw, ends):
    """A tempting wrong rule: draw again where the first draw is no child. Favours the draft."""
    batch = len(trees)
    walk = BatchWalk([[] for _ in range(batch)], [[] for _ in range(batch)])
    nodes = [0] * batch
    walking = list(range(batch))
    while walking:
        rows = [first_row[i] + nodes[i] for i in walking]
        chances = zip(walking, draw(walking, rows), draw(walking, rows), strict=True)
        still_walking = []
        for i, *drawn in chances:
            children = [trees[i].child(nodes[i], token) if trees[i] else None for token in drawn]
            take = int(children[0] is None and children[1] is not None)
            walk.tokens[i].append(drawn[take])
            if children[take] is not None:
                walk.paths[i].append(children[take])
                nodes[i] = children[take]
                still_walking.append(i)
        walking = still_walking
    return walk
