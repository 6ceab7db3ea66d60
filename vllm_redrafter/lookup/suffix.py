# SPDX-License-Identifier: Apache-2.0
"""Continuations of a request's own text: what followed when its last tokens stood there before.

Like vLLM's n-gram drafts and SuffixDecoding (arXiv 2411.04975), but for trees: several occurrences
are followed at once, and every drafted token has a probability, so that it can compete with the
nodes of a drafter.

There is no index. The text of a request is the row of token ids that vLLM keeps for it anyway; it
is searched backwards from its end, and that is fast enough for any context (``csrc/README.md`` has
the times). So nothing has to be kept up to date, freed, or built again after a preemption, and it
takes no memory per token.

These loops are the definition; ``vllm_redrafter.ops.suffix_lookup`` is the compiled form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import FILLER_SCORE
from vllm_redrafter.lookup.sizes import MAX_CHAINS, MAX_DEPTH

# Most recent occurrences of the last token that are looked at, and tokens compared before each.
WINDOW = 32
LONGEST_MATCH = 32

# Chance that a continuation goes on as it did before, when m tokens before it agree:
# CERTAINTY * (1 - MISS ** m). Fitted to greedy answers of SmolLM2 to MT-bench and HumanEval.
MISS = 0.75
CERTAINTY = 0.98


@dataclass(frozen=True)
class Chains:
    """What a lookup found for a batch, the longest match first.

    Attributes:
        tokens: ``[B, C, D]`` int64, the D tokens that followed each occurrence; 0 where there is
            none.
        matched: ``[B, C]`` int64, how many tokens before them agree with the end of the text; 0
            where there are fewer than C occurrences.
        scores: ``[B, C, D]`` float32, log-probability of the path from the root up to each token;
            ``FILLER_SCORE`` where there is none. They never rise along a chain.
    """

    tokens: Tensor
    matched: Tensor
    scores: Tensor


def suffix_lookup(
    text: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    chains: int = MAX_CHAINS,
    depth: int = MAX_DEPTH,
    window: int = WINDOW,
    longest: int = LONGEST_MATCH,
) -> Chains:
    """Where the end of each request's text stood before, and what came then.

    Of the ``window`` most recent earlier occurrences of the last token, the ``chains`` with the
    most agreeing tokens are followed; of equally long matches the more recent one. A continuation
    that arrives at the end of the text goes on behind its own start, as a loop would.

    The probability of a chain's token is the product, over the depths up to it, of the share of
    the chains so far equal that go on with the same token, and of the chance above, in which every
    further token of the path counts as matched.

    Args:
        text: ``[R, S]`` int32, token ids of all request slots.
        slots: ``[B]`` int32, the row of each request of the batch.
        starts: ``[B]`` int32, where its text begins: tokens before are not looked at.
        ends: ``[B]`` int32, its length; the token before the end is the known one, the root.
        chains: C >= 1.
        depth: D >= 1.
        window: at least 1.
        longest: at least 1; more agreeing tokens are not counted.

    Returns:
        Chains. Without a token between start and end nothing is found.

    Raises:
        ValueError: a number below 1.
    """
    check_sizes(chains, depth, window, longest)
    batch = slots.shape[0]
    out = Chains(
        tokens=torch.zeros(batch, chains, depth, dtype=torch.int64),
        matched=torch.zeros(batch, chains, dtype=torch.int64),
        scores=torch.full((batch, chains, depth), FILLER_SCORE),
    )
    for b in range(batch):
        row = text[int(slots[b]), int(starts[b]) : int(ends[b])].tolist()
        found = _longest(_occurrences(row, window, longest), chains)
        paths = [_continuation(row, at, depth) for _, at in found]
        for c, (matched, _) in enumerate(found):
            out.tokens[b, c] = torch.tensor(paths[c])
            out.matched[b, c] = matched
            out.scores[b, c] = torch.tensor(_scores(paths, c, matched))
    return out


def check_sizes(chains: int, depth: int, window: int, longest: int) -> None:
    """Raise ValueError for a number that cannot be."""
    if min(chains, depth, window, longest) < 1:
        raise ValueError(
            f"chains {chains}, depth {depth}, window {window} and longest {longest} must all be at "
            "least 1."
        )


def _occurrences(row: list[int], window: int, longest: int) -> list[tuple[int, int]]:
    """(agreeing tokens, position) of earlier occurrences of the last token, latest first."""
    end, found = len(row) - 1, []
    for at in range(end - 1, -1, -1):
        if len(found) == window:
            break
        if row[at] == row[end]:
            matched = 1
            while matched < min(longest, at + 1) and row[at - matched] == row[end - matched]:
                matched += 1
            found.append((matched, at))
    return found


def _longest(found: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    # A stable sort: of equal matches the more recent one stays in front.
    return sorted(found, key=lambda occurrence: -occurrence[0])[:count]


def _continuation(row: list[int], at: int, depth: int) -> list[int]:
    period = len(row) - 1 - at
    return [row[at + 1 + i % period] for i in range(depth)]


def _scores(paths: list[list[int]], c: int, matched: int) -> list[float]:
    score, scores = 0.0, []
    for d in range(len(paths[c])):
        so_far = [path for path in paths if path[:d] == paths[c][:d]]
        same = [path for path in so_far if path[d] == paths[c][d]]
        score += math.log(len(same) / len(so_far))
        score += math.log(CERTAINTY * (1 - MISS ** (matched + d)))
        scores.append(score)
    return scores
