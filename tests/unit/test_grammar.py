# SPDX-License-Identifier: Apache-2.0
"""Candidates under a grammar, against the definition: a language that is a list of sentences."""

import math
import random

import numpy as np
import pytest

from vllm_redrafter.tree.candidates import FROM_DRAFTER, FROM_GRAMMAR
from vllm_redrafter.tree.grammar import LEAST, allowed_nodes, grow, walk

END = 0
# Tokens are strings of the letters a and b; the first one ends a sentence.
TEXTS = ["", "a", "b", "aa", "ab", "ba", "aba", "abab"]


class Sentences:
    """The matcher of a finite language, by definition: which sentences begin with what was said."""

    def __init__(self, sentences):
        self.sentences, self.path = sentences, []

    @property
    def ended(self):
        return self.path[-1:] == [END]

    def said(self, path):
        return "".join(TEXTS[token] for token in path)

    def fits(self, path):
        if END in path[:-1]:
            return False
        if path and path[-1] == END:
            return self.said(path) in self.sentences
        return any(s.startswith(self.said(path)) for s in self.sentences)

    def advance(self, token):
        if not self.fits([*self.path, token]):
            return False
        self.path.append(token)
        return True

    def back(self, count):
        assert count <= len(self.path)
        del self.path[len(self.path) - count :]

    def allowed(self):
        return np.array([t for t in range(len(TEXTS)) if self.fits([*self.path, t])])

    def forced(self):
        """The longest text that all sentences go on with, in longest tokens."""
        said = self.said(self.path)
        rests = [s[len(said) :] for s in self.sentences if s.startswith(said)]
        text = ""
        while all(r[len(text) : len(text) + 1] == rests[0][len(text) : len(text) + 1] != ""
                  for r in rests):  # fmt: skip
            text = rests[0][: len(text) + 1]
        tokens = []
        while text:
            tokens.append(max((t for t in range(1, len(TEXTS)) if text.startswith(TEXTS[t])),
                              key=lambda t: len(TEXTS[t])))  # fmt: skip
            text = text[len(TEXTS[tokens[-1]]) :]
        return tokens

    def text(self, token):
        return TEXTS[token].encode()


def language(source):
    return {"".join(source.choices("ab", k=source.randint(1, 7))) for _ in range(4)}


def random_tree(source, nodes):
    tokens = [source.randrange(len(TEXTS)) for _ in range(nodes)]
    return tokens, [source.randint(0, node) for node in range(nodes)]


def path_of(tokens, parents, node):
    path = []
    while node:
        path.append(tokens[node - 1])
        node = parents[node - 1]
    return path[::-1]


@pytest.mark.parametrize("seed", range(30))
def test_nodes_that_are_allowed(seed):
    source = random.Random(seed)
    matcher = Sentences(language(source))
    tokens, parents = random_tree(source, 24)
    paths = [path_of(tokens, parents, node) for node in range(25)]
    expected = [node for node in range(1, 25) if matcher.fits(paths[node])]
    assert allowed_nodes(tokens, parents, matcher) == expected
    assert matcher.path == []
    seen = {}
    walk(tokens, parents, matcher, lambda node: seen.update({node: list(matcher.path)}))
    assert seen == {node: paths[node] for node in [0, *expected]}


def test_control_a_tree_read_as_a_chain():
    """Siblings that are taken for each other's parents: other nodes would be allowed."""
    matcher = Sentences({"aa", "ab"})
    tokens, parents = [1, 1, 2], [0, 1, 1]
    assert allowed_nodes(tokens, parents, matcher) == [1, 2, 3]
    assert allowed_nodes(tokens, [0, 1, 2], matcher) == [1, 2]


def drafted(source):
    """Paths with log-probabilities, those that they extend among them."""
    known = {}
    for _ in range(12):
        path, score = (), 0.0
        for _ in range(source.randint(1, 4)):
            path = (*path, source.randrange(len(TEXTS)))
            score += math.log(source.uniform(0.05, 0.12))
            score = known.setdefault(path, (score, FROM_DRAFTER))[0]
    return known


@pytest.mark.parametrize("seed", range(30))
def test_what_is_grown(seed):
    source = random.Random(seed)
    matcher, known = Sentences(language(source)), drafted(source)
    grown = grow(known, matcher, 20, 5, FROM_GRAMMAR)
    assert matcher.path == []
    paths = [each.path for each in grown]
    assert len(paths) == len(set(paths)) <= 20
    scores = [each.score for each in grown]
    assert scores == sorted(scores, reverse=True) and scores[-1] >= math.log(LEAST)
    for place, each in enumerate(grown):
        assert matcher.fits(list(each.path)) and len(each.path) <= 5
        assert len(each.path) == 1 or each.path[:-1] in paths[:place]
        assert each.source == (FROM_DRAFTER if each.path in known else FROM_GRAMMAR)
    # Behind every node, the probabilities of its children are some of at most 1.
    for parent in [(), *paths]:
        below = [each.score for each in grown if each.path[:-1] == parent]
        above = dict(zip(paths, scores, strict=True)).get(parent, 0.0)
        assert sum(math.exp(score - above) for score in below) <= 1 + 1e-9


def test_the_order_among_allowed_tokens_is_the_drafters(monkeypatch):
    monkeypatch.setattr("vllm_redrafter.tree.grammar.FEW", 0)
    monkeypatch.setattr(Sentences, "forced", lambda self: [])
    matcher = Sentences({"ab", "bb", "ba"})
    known = {(1,): (-3.0, 1), (2,): (-1.0, 1), (3,): (-0.5, 1), (2, 2): (-1.5, 1)}
    grown = grow(known, matcher, 9, 4, FROM_GRAMMAR)
    # "aa" is forbidden, and its share is gone from the others'.
    assert [each.path for each in grown][:2] == [(2,), (2, 2)]
    assert (1,) in [each.path for each in grown]
    assert grown[0].score > -1.0


def test_a_forced_text_needs_no_draft():
    grown = grow({}, Sentences({"abab"}), 3, 5, FROM_GRAMMAR)
    assert grown[0].path == (7,)  # in one token, as the tokenizer writes it
    assert (7, END) in [each.path for each in grown]
    assert all(each.source == FROM_GRAMMAR for each in grown)


def test_a_choice_branches():
    first = [each.path for each in grow({}, Sentences({"aa", "ba"}), 2, 5, FROM_GRAMMAR)]
    assert first == [(3,), (5,)]  # the longest token of each


def test_nothing_behind_the_end():
    known = {(END,): (-0.1, 1), (END, 1): (-0.2, 1)}
    matcher = Sentences({"", "a"})
    assert (END, 1) not in [each.path for each in grow(known, matcher, 9, 5, FROM_GRAMMAR)]
    assert allowed_nodes([END, 1], [0, 1], matcher) == [1]


@pytest.mark.parametrize("most, deepest", [(0, 5), (5, 0)])
def test_no_room(most, deepest):
    assert grow({}, Sentences({"ab"}), most, deepest, FROM_GRAMMAR) == []


class Json(Sentences):
    """Behind a key of JSON: marks in one token or several, and white space of any length."""

    texts = [b'"', b'":', b'":"', b":", *(b" " * n for n in range(1, 60))]

    def __init__(self):
        self.path = []

    def allowed(self):
        return np.arange(3) if not self.path else np.arange(3, len(self.texts))

    def advance(self, token):
        self.path.append(token)
        return True

    ended = False

    def forced(self):
        return [] if self.path else [0]

    def text(self, token):
        return self.texts[token]


def test_marks_and_white_space():
    grown = {each.path: each.score for each in grow({}, Json(), 9, 2, FROM_GRAMMAR)}
    # No way to write the marks is preferred, and behind them white space is not drafted.
    assert grown[(0,)] == grown[(1,)] == grown[(2,)] == pytest.approx(math.log(1 / 3))
    assert grown[(0, 3)] == pytest.approx(math.log(0.7 / 3))
    assert {path[1:] for path in grown} == {(), (3,)}
