# SPDX-License-Identifier: Apache-2.0
"""vLLM's steps on recorded greedy answers, replayed without vLLM.

A draft depends on a hidden state of the target, on the token after it and, with a lookup, on the
text up to there, and on a greedy answer all of that is known. So all positions are drafted at once,
in chunks, and the steps of every answer are then only jumps over the numbers of accepted tokens.

Counting is that of vLLM's ``spec_decode`` metrics: the first token of an answer comes from prefill,
every later step makes one draft, and the acceptance length is 1 + accepted / drafts. The last token
of an answer is never accepted: the walk ends there (``engine.v1.ending``). The end needs two facts
that the tokens of an answer do not hold:

* A request that ``max_tokens`` ends makes no draft when one token is left, and under the rule
  ``best`` its trees are no deeper than what is left. A recording can say so (``finish_reason``
  "length"); without it every step but the first drafts, as deep as it can.
* An answer that stops by itself may do so shortly before ``max_tokens``. A recording can name that
  limit (``max_tokens``); without it there is none.

With both, the counts are vLLM's, request by request, wherever the engine's logits and these agree
on every argmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_redrafter.budget.policy import choose_alone
from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.candidates import choose_tree, merge_candidates
from vllm_redrafter.ops.draft import CompiledDraft
from vllm_redrafter.ops.suffix_lookup import suffix_lookup
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.training.answers import Recorded
from vllm_redrafter.training.target import Target, padded_groups
from vllm_redrafter.tree.candidates import FROM_DRAFTER, SOURCE_NAMES
from vllm_redrafter.tree.tree import Tree

TOP = 5
NO_TOKEN = -1  # behind an answer's end; no drafted token equals it
# Who drafted an accepted token, and how candidates say so.
SOURCES = {name: code for code, name in SOURCE_NAMES.items()}
# Numbers of one chunk's logits (positions x beams x vocabulary): 128 MiB in float32.
_CHUNK_LOGITS = 1 << 25

Progress = Callable[[int, int], None]
# A setting -> [N + 1] milliseconds of a step with 0, 1, ... N nodes, and those of its draft.
StepCosts = Callable[["Setting"], tuple[np.ndarray, float]]


@dataclass(frozen=True)
class Setting:
    """Beam width W, draft length L, and the most drafted nodes N of a tree."""

    beam_width: int
    draft_length: int
    num_nodes: int

    def __str__(self) -> str:
        return f"{self.beam_width},{self.draft_length},{self.num_nodes}"


@dataclass
class Counts:
    """Sums over steps, of one setting.

    Attributes:
        drafts: steps that drafted; of a budget also those for which it took no node.
        accepted: drafted tokens that the target agreed with.
        nodes: drafted tokens in the trees, roots not among them.
        milliseconds: of all steps, where a budget weighs them.
        lookup, both: accepted tokens that the lookup alone had drafted, or drafter and lookup.
            vLLM's counters do not tell them apart: they play no part in comparisons.
    """

    drafts: int = 0
    accepted: int = 0
    nodes: int = 0
    milliseconds: float = field(default=0.0, compare=False)
    lookup: int = field(default=0, compare=False)
    both: int = field(default=0, compare=False)

    def add(self, other: Counts) -> None:
        self.drafts += other.drafts
        self.accepted += other.accepted
        self.nodes += other.nodes
        self.milliseconds += other.milliseconds
        self.lookup += other.lookup
        self.both += other.both

    @property
    def acceptance_length(self) -> float:
        """Tokens per drafting step; NaN without a step."""
        return 1 + self.accepted / self.drafts if self.drafts else math.nan

    @property
    def by_source(self) -> dict[str, int]:
        """Accepted tokens by who had drafted them."""
        drafter = self.accepted - self.lookup - self.both
        return {"drafter": drafter, "lookup": self.lookup, "both": self.both}


@dataclass
class Outcome:
    """One answer's results.

    Attributes:
        counts: by setting.
        hits: ``[L, 3]`` int64 by depth: positions, right first guesses, right among the top five.
        agreeing: answer tokens that are the target's own first choice.
    """

    counts: dict[Setting, Counts] = field(default_factory=dict)
    hits: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))
    agreeing: int = 0


@dataclass(frozen=True)
class Verified:
    """What drafts at P positions gave, on the CPU.

    Attributes:
        accepted: ``[P]`` int64, drafted tokens that agree with the answer.
        nodes: ``[P]`` int64, drafted tokens in the tree.
        sources: ``[P, 3]`` int64, the accepted ones by who drafted them, in the order of SOURCES.
    """

    accepted: Tensor
    nodes: Tensor
    sources: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Verified]) -> Verified:
        return cls(
            torch.cat([part.accepted for part in parts]),
            torch.cat([part.nodes for part in parts]),
            torch.cat([part.sources for part in parts]),
        )

    def steps(self, begin: int, end: int, milliseconds: np.ndarray | None = None) -> Counts:
        """Decode the answer whose drafts were made at these positions.

        Args:
            milliseconds: ``[N + 1]`` of a step by its nodes, the draft's included; None: not known.
        """
        rows = slice(begin, end)
        nodes = self.nodes[rows]
        took = [] if milliseconds is None else milliseconds[nodes.numpy()].tolist()
        return steps_of(
            self.accepted[rows].tolist(), nodes.tolist(), self.sources[rows].tolist(), took
        )


def steps_of(
    accepted: Sequence[int],
    nodes: Sequence[int],
    sources: Sequence[Sequence[int]] = (),
    milliseconds: Sequence[float] = (),
) -> Counts:
    """Decode one answer: jump over what every draft on the way gets accepted.

    Args:
        accepted: by position p of the known token, from 0 on while drafts are made: how many
            tokens of the draft made there agree with the answer before its last token.
        nodes: drafted tokens in the tree at each of these positions.
        sources: at each of them, as ``Verified.sources``; empty: all are the drafter's.
        milliseconds: of a step at each of them; empty: not known.
    """
    counts, at = Counts(), 0
    while at < len(accepted):
        _, lookup, both = sources[at] if sources else (0, 0, 0)
        took = milliseconds[at] if milliseconds else 0.0
        counts.add(Counts(1, accepted[at], nodes[at], took, lookup, both))
        at += accepted[at] + 1
    return counts


class Replay:
    """A drafter at several settings over the hidden states of answers.

    Memory: on the CPU every pair of W and L among the settings packs the drafter's layers once.

    Args:
        drafter: with its embedding bound, on one device.
        settings: at least one.
        rule: ``best`` or ``beams``.
        lookup_tokens: how far the lookup in the text follows an occurrence; 0 for no lookup, as
            the rule ``beams`` demands.
        costs: of a node budget: every step verifies as many nodes as pay, as the engine's does for
            a request that runs alone, but with probabilities as they are predicted: the engine
            corrects them by what came true. None: as many as there are.
    """

    def __init__(
        self,
        drafter: Drafter,
        settings: Sequence[Setting],
        rule: str,
        lookup_tokens: int = 0,
        costs: StepCosts | None = None,
    ) -> None:
        if lookup_tokens and rule == "beams":
            raise ValueError("The rule 'beams' knows no lookup.")
        if costs is not None and rule == "beams":
            raise ValueError("The rule 'beams' knows no node budget.")
        self.costs = None if costs is None else {s: costs(s) for s in settings}
        self.drafter, self.settings, self.rule = drafter, list(settings), rule
        self.lookup_tokens = lookup_tokens
        self.draft_length = max(setting.draft_length for setting in settings)
        # Of the deepest tree.
        self.depth = max(min(max(s.draft_length, lookup_tokens), s.num_nodes) for s in settings)
        self._drafts: dict[tuple[int, int], CompiledDraft] = {}
        for s in settings:
            key = (s.beam_width, s.draft_length)
            if key not in self._drafts:
                self._drafts[key] = CompiledDraft(
                    drafter, beam_width=s.beam_width, draft_length=s.draft_length
                )

    def accepted(
        self,
        context: Tensor,
        following: Tensor,
        chains: Chains | None = None,
        limits: Tensor | None = None,
    ) -> dict[Setting, Verified]:
        """Draft at every position and walk the trees along the answer.

        Args:
            context: ``[P, H]``, the hidden states that predicted the known tokens.
            following: ``[P, >= depth + 2]`` int64, the known token, those after it, and NO_TOKEN
                behind the end.
            chains: what the lookup found at each position; None for no lookup.
            limits: ``[P]`` int64, how deep trees of the rule ``best`` may be; None for no limit.
        """
        parts: dict[Setting, list[Verified]] = {s: [] for s in self.settings}
        for (width, length), draft in self._drafts.items():
            mine = [s for s in self.settings if (s.beam_width, s.draft_length) == (width, length)]
            size = self._chunk(width)
            for begin in range(0, len(following), size):
                rows = slice(begin, begin + size)
                tokens = following[rows]
                beams = draft(context[rows], tokens[:, 0].contiguous())
                found = None if chains is None else _rows(chains, rows)
                most = None if limits is None else limits[rows]
                for setting in mine:
                    tree, sources = self._trees(beams, found, setting, most)
                    parts[setting].append(_verified(tree, sources, tokens))
        return {setting: Verified.joined(chunks) for setting, chunks in parts.items()}

    def _trees(
        self, beams: Beams, chains: Chains | None, setting: Setting, limits: Tensor | None
    ) -> tuple[Tree, Tensor]:
        """Trees as the engine builds them, and ``[B, M]`` who drafted their nodes."""
        if self.rule == "beams":
            tree, _ = build_tree(beams, self.rule, setting.num_nodes)
            return tree, torch.full_like(tree.tokens, FROM_DRAFTER)
        candidates = merge_candidates(beams.root, beams, chains, setting.num_nodes, limits)
        counts = candidates.counts
        if self.costs is not None:
            probabilities = candidates.scores.exp().double().cpu().numpy()
            milliseconds, draft = self.costs[setting]
            most = probabilities.shape[1] + 1
            chosen_counts = choose_alone(probabilities, milliseconds[:most], draft)
            counts = torch.minimum(counts, torch.from_numpy(chosen_counts).to(counts.device))
        tree, _, chosen = choose_tree(candidates, counts)
        return tree, candidates.sources.gather(1, chosen.clamp(min=0))

    def step_milliseconds(self, setting: Setting) -> np.ndarray | None:
        """``[N + 1]`` of a step by its nodes, the draft's included; None without a budget."""
        if self.costs is None:
            return None
        milliseconds, draft = self.costs[setting]
        return milliseconds + draft

    def look_up(self, recorded: Recorded, device: torch.device) -> Chains | None:
        """What the lookup finds at every position of an answer but the last."""
        if not self.lookup_tokens:
            return None
        text = torch.tensor([recorded.prompt + recorded.answer], dtype=torch.int32, device=device)
        first = len(recorded.prompt) + 1  # the known token is the last one of the text
        ends = torch.arange(first, text.shape[1], dtype=torch.int32, device=device)
        zeros = torch.zeros_like(ends)
        return suffix_lookup(text, zeros, zeros, ends, depth=self.lookup_tokens)

    @torch.inference_mode()
    def hits(self, context: Tensor, following: Tensor) -> Tensor:
        """Teacher-forced guesses of the drafter: the state at depth i was fed with the answer.

        Args:
            context, following: as in ``accepted``; the draft length is what counts here.

        Returns:
            ``[P, L, 3]`` bool on the CPU: whether the answer has a token there, whether it is
            the first guess, whether it is among the first five.
        """
        parts = []
        size = self._chunk(1)
        for states, tokens in zip(context.split(size), following.split(size), strict=True):
            state = self.drafter.initial_state(len(tokens))
            depths = []
            for i in range(self.draft_length):
                # Behind the end there is no token to feed; what comes of token 0 is not counted.
                logits, state = self.drafter(states, tokens[:, i].clamp(min=0), state)
                truth = tokens[:, i + 1]
                best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
                right = self.drafter.to_target_ids(best) == truth[:, None]
                depths.append(torch.stack([truth != NO_TOKEN, right[:, 0], right.any(1)], 1))
            parts.append(torch.stack(depths, 1).cpu())
        return torch.cat(parts)

    def _chunk(self, width: int) -> int:
        return max(1, _CHUNK_LOGITS // (width * self.drafter.config.draft_vocab_size))


def _verified(tree: Tree, sources: Tensor, tokens: Tensor) -> Verified:
    # On the accepted path the target's choice at depth d is the answer's token.
    choices = tokens.gather(1, tree.depths.clamp(0, tokens.shape[1] - 2) + 1)
    walked = walk(tree, choices)
    on_path = walked.path >= 0
    drafted_by = sources.gather(1, walked.path.clamp(min=0))
    by_source = [(on_path & (drafted_by == code)).sum(1) for code in SOURCES.values()]
    return Verified(
        walked.num_accepted.cpu(), (tree.num_nodes - 1).cpu(), torch.stack(by_source, 1).cpu()
    )


def _rows(chains: Chains, rows: slice) -> Chains:
    return Chains(**{name: tensor[rows] for name, tensor in vars(chains).items()})


def _joined(parts: Sequence[Chains | None]) -> Chains | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return Chains(**{name: torch.cat([getattr(part, name) for part in found])
                     for name in vars(found[0])})  # fmt: skip


def following_tokens(answer: Sequence[int], depth: int) -> Tensor:
    """``[len(answer) - 1, depth + 2]`` int64: row p holds the answer from p on, then NO_TOKEN."""
    padded = torch.tensor([*answer, *[NO_TOKEN] * (depth + 1)], dtype=torch.int64)
    return padded.unfold(0, depth + 2, 1)[: len(answer) - 1]


def depth_limits(recorded: Recorded, unlimited: int) -> Tensor:
    """``[len(answer) - 1]`` int64: how deep the tree behind each known token may be.

    Behind token p the limit leaves limit - p - 1 tokens, and the target says the last one itself.

    Args:
        unlimited: stands where no limit is known.
    """
    positions = torch.arange(len(recorded.answer) - 1)
    if recorded.limit is None:
        return torch.full_like(positions, unlimited)
    return (recorded.limit - 2 - positions).clamp(min=0)


def replay(
    target: Target,
    replayer: Replay,
    answers: Sequence[Recorded],
    *,
    group_tokens: int = 8192,
    progress: Progress = lambda done, total: None,
) -> list[Outcome]:
    """Results of every answer, in their order.

    Args:
        group_tokens: texts, padding included, whose hidden states are computed at once; one text
            may be longer.
        progress: called as ``progress(answers done, answers in all)``.
    """
    outcomes: list[Outcome] = [Outcome() for _ in answers]
    done = 0
    for members in padded_groups([len(a.prompt + a.answer) for a in answers], group_tokens):
        group = [answers[i] for i in members]
        results = _replay_group(target, replayer, group)
        for i, outcome in zip(members, results, strict=True):
            outcomes[i] = outcome
        done += len(members)
        progress(done, len(answers))
    return outcomes


def _replay_group(target: Target, replayer: Replay, group: Sequence[Recorded]) -> list[Outcome]:
    """Results of answers whose hidden states are computed together."""
    states = target.hidden([torch.tensor(one.prompt + one.answer) for one in group])
    outcomes, context = [], []
    for one, hidden in zip(group, states, strict=True):
        first = len(one.prompt) - 1
        predicting = hidden[first : first + len(one.answer)]
        outcomes.append(Outcome(agreeing=_agreeing(target, predicting, one.answer)))
        context.append(predicting[:-1])  # the last token is the known one of no step
    rows = torch.cat(context)
    if not len(rows):
        return [_nothing_drafted(replayer, outcome) for outcome in outcomes]
    depth, length, device = replayer.depth, replayer.draft_length, target.device
    verified = replayer.accepted(
        rows,
        torch.cat([following_tokens([*one.answer[:-1], NO_TOKEN], depth) for one in group]).to(
            device
        ),
        _joined([replayer.look_up(one, device) for one in group]),
        torch.cat([depth_limits(one, depth) for one in group]).to(device),
    )
    following = torch.cat([following_tokens(one.answer, length) for one in group])
    hits = replayer.hits(rows, following.to(device))
    begin = 0
    for one, outcome in zip(group, outcomes, strict=True):
        outcome.hits = hits[begin : begin + len(one.answer) - 1].sum(0)
        end = begin + one.drafting_positions
        outcome.counts = {
            s: results.steps(begin, end, replayer.step_milliseconds(s))
            for s, results in verified.items()
        }
        begin += len(one.answer) - 1
    return outcomes


def _nothing_drafted(replayer: Replay, outcome: Outcome) -> Outcome:
    outcome.counts = {setting: Counts() for setting in replayer.settings}
    outcome.hits = torch.zeros(replayer.draft_length, 3, dtype=torch.int64)
    return outcome


@torch.inference_mode()
def _agreeing(target: Target, predicting: Tensor, answer: Sequence[int]) -> int:
    """How many tokens are the argmax of the target (its logits' scale and cap change no argmax)."""
    wanted = torch.tensor(answer, device=predicting.device)
    size = max(1, _CHUNK_LOGITS // target.vocab_size)
    same = 0
    for states, tokens in zip(predicting.split(size), wanted.split(size), strict=True):
        same += int(((states.to(target.head.dtype) @ target.head.T).argmax(-1) == tokens).sum())
    return same
