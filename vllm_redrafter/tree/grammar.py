# SPDX-License-Identifier: Apache-2.0
"""Candidates under a grammar: only what it allows, and what it forces.

A matcher knows the state of a grammar behind the text so far; it is moved along a branch and back.
Nothing here decides what is said: a target's own token is drawn under the mask of its node, and
what was drafted only has to be likely.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Where no more tokens are allowed than this, those that nobody drafted are candidates too. White
# space does not count, of which JSON allows any amount: vocabularies have many tokens of it.
FEW, WITH_WHITE_SPACE = 16, 512

# Of tokens that nobody drafted: white space, where it is allowed, against the others.
WHITE_SPACE = 0.3

# Shares of the tokens of a forced text, as the tokenizer writes it, against other ways to write it.
# The last of them may be one token with what follows, which is not known.
AS_WRITTEN, LAST_AS_WRITTEN = 0.95, 0.6

# Of words that nobody drafted: those that no other allowed word continues, against the others.
LONGEST = 0.9

# Paths less likely than this are not looked for.
LEAST = 1e-4


class Matcher(Protocol):
    """The state of a grammar, on the path from the known token to a node."""

    @property
    def ended(self) -> bool:
        """Whether the grammar is over and allows anything: nothing is drafted behind that."""

    def advance(self, token: int) -> bool:
        """One token further; False, and nothing changes, where it is not allowed."""

    def back(self, count: int) -> None:
        """So many tokens back."""

    def allowed(self) -> np.ndarray:
        """``[n]`` int64, the tokens that may follow."""

    def forced(self) -> list[int]:
        """The text that must follow, as the tokenizer writes it; empty where there is a choice."""

    def text(self, token: int) -> bytes:
        """What a token says."""


@dataclass(frozen=True)
class Grown:
    """A node of ``grow``: its path from the known token, log-probability and source."""

    path: tuple[int, ...]
    score: float
    source: int


def walk(
    tokens: Sequence[int],
    parents: Sequence[int],
    matcher: Matcher,
    visit: Callable[[int], None],
) -> None:
    """Visit the root and all nodes that the grammar allows, the matcher being at each of them.

    The matcher is where it was when this returns. Nodes behind an ended grammar are not visited.

    Args:
        tokens: of node i + 1.
        parents: of node i + 1, a node before it; 0 is the root.
        visit: called with the node.
    """
    children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
    for node, parent in enumerate(parents, start=1):
        children[parent].append(node)

    def descend(node: int) -> None:
        visit(node)
        if matcher.ended:
            return
        for child in children[node]:
            if matcher.advance(tokens[child - 1]):
                descend(child)
                matcher.back(1)

    descend(0)


def allowed_nodes(tokens: Sequence[int], parents: Sequence[int], matcher: Matcher) -> list[int]:
    """The nodes that the grammar allows, with all their ancestors, in order; without the root."""
    kept: list[int] = []
    walk(tokens, parents, matcher, kept.append)
    return sorted(kept[1:])


def grow(
    known: Mapping[tuple[int, ...], tuple[float, int]],
    matcher: Matcher,
    most: int,
    max_depth: int,
    source: int,
) -> list[Grown]:
    """The likeliest paths that the grammar allows: drafted ones and those that it leaves.

    A drafted token's probability is taken given that the token is allowed. Tokens that nobody
    drafted come in where the grammar forces a text, or leaves ``FEW`` tokens.

    Args:
        known: log-probability and source of drafted paths; with a path, those that it extends.
        matcher: behind the known token; it is there again afterwards.
        most: paths at most.
        max_depth: of a path.
        source: of paths that nobody drafted.

    Returns:
        likeliest first; a path comes behind those that it extends.
    """
    below = _children(known)
    at: tuple[int, ...] = ()
    grown: list[Grown] = []
    # (-score, depth, order of insertion, path, source, rest of a forced text)
    heap: list[tuple[float, int, int, tuple[int, ...], int, list[int]]] = []
    pushed = 0

    def go(path: tuple[int, ...]) -> bool:
        nonlocal at
        same = 0
        while same < min(len(at), len(path)) and at[same] == path[same]:
            same += 1
        if same < len(at):
            matcher.back(len(at) - same)
        at = at[:same]
        for token in path[same:]:
            if not matcher.advance(token):
                return False
            at = (*at, token)
        return True

    def expand(path: tuple[int, ...], score: float, ahead: list[int]) -> None:
        nonlocal pushed
        if matcher.ended or len(path) >= max_depth:
            return
        drafted = below.get(path, {})
        shares, rest = _shares(matcher, {t: p for t, (p, _) in drafted.items()}, ahead)
        for token, share in shares.items():
            new = score + math.log(share) if share > 0 else -math.inf
            if new >= math.log(LEAST):
                by = drafted[token][1] if token in drafted else source
                follows = rest[1:] if rest and token == rest[0] else []
                entry = (-new, len(path) + 1, pushed, (*path, token), by, follows)
                heapq.heappush(heap, entry)
                pushed += 1

    expand((), 0.0, [])
    while heap and len(grown) < most:
        negative, _, _, path, by, ahead = heapq.heappop(heap)
        if not go(path):
            continue  # in the mask, and yet refused: a special token
        grown.append(Grown(path, -negative, by))
        if len(grown) < most:
            expand(path, -negative, ahead)
    go(())
    return grown


def _children(
    known: Mapping[tuple[int, ...], tuple[float, int]],
) -> dict[tuple[int, ...], dict[int, tuple[float, int]]]:
    """By path, the tokens drafted behind it: their probability given the path, and source."""
    below: dict[tuple[int, ...], dict[int, tuple[float, int]]] = {}
    for path, (score, source) in known.items():
        above = known[path[:-1]][0] if len(path) > 1 else 0.0
        below.setdefault(path[:-1], {})[path[-1]] = (math.exp(min(0.0, score - above)), source)
    return below


def _shares(
    matcher: Matcher, drafted: Mapping[int, float], ahead: list[int]
) -> tuple[dict[int, float], list[int]]:
    """The probabilities of a node's children, and the forced text from here on, if any."""
    allowed = matcher.allowed()
    may = set(allowed.tolist())
    if len(may) == 1:
        only = next(iter(may))
        return {only: 1.0}, ahead if ahead[:1] == [only] else []
    forced = ahead or matcher.forced()
    if forced and forced[0] not in may:
        forced = []
    shares = {token: share for token, share in drafted.items() if token in may}
    unknown = max(0.0, 1.0 - sum(drafted.values()))
    if len(may) <= WITH_WHITE_SPACE:
        say = [token for token in may if not matcher.text(token).isspace()]
        if len(say) <= FEW:
            others = [token for token in say if token not in shares]
            white = unknown * (WHITE_SPACE if len(say) < len(may) else 0.0)
            _share_out(shares, others, unknown - white, matcher)
            unknown = white
    total = sum(shares.values()) + unknown
    shares = {token: share / total for token, share in shares.items()} if total > 0 else {}
    # A last mark may well be one token with those that follow, as in JSON.
    if len(forced) > 1 or (forced and _is_word(matcher.text(forced[0]))):
        first = LAST_AS_WRITTEN if len(forced) == 1 else AS_WRITTEN
        shares = {token: (1 - first) * share for token, share in shares.items()}
        shares[forced[0]] = first + shares.get(forced[0], 0.0)
    return shares, forced


def _share_out(
    shares: dict[int, float], others: list[int], unknown: float, matcher: Matcher
) -> None:
    """Give tokens that nobody drafted what is left; of words, most of it to the longest ones.

    A tokenizer seldom writes a part of a word where the whole one is a token.
    """
    words = {t: text for t in others if _is_word(text := matcher.text(t))}
    parts = {
        t for t, text in words.items()
        if any(other != text and other.startswith(text) for other in words.values())
    }  # fmt: skip
    groups = [[t for t in others if t not in parts], sorted(parts)]
    of_whole = unknown * (LONGEST if parts else 1.0)
    for group, share in zip(groups, (of_whole, unknown - of_whole), strict=True):
        for token in group:
            shares[token] = share / len(group)


def _is_word(text: bytes) -> bool:
    """Whether a token ends within or behind a word."""
    return text[-1:].isalnum()
