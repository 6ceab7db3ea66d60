# SPDX-License-Identifier: Apache-2.0
"""The draft of one step: which drafter runs, whose candidates compete, how many nodes they get.

Three decisions, each of which is a pure module: the kind of the drafter's run (``budget.planner``),
the candidates of beams and lookup in one prefix tree (``tree.candidates``), the number of nodes per
request over the whole batch (``budget.policy``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_redrafter.budget.costs import NO_DRAFT, DraftShape
from vllm_redrafter.budget.doubt import Doubt
from vllm_redrafter.budget.model import CostModel
from vllm_redrafter.budget.planner import ENOUGH, DraftPlanner, draft_shapes
from vllm_redrafter.budget.policy import choose
from vllm_redrafter.budget.trust import Trust, kind_of
from vllm_redrafter.drafter.beam_search import FILLER_SCORE, Beams, greedy_chain
from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.v1.request_tree import NOTHING, RequestTree
from vllm_redrafter.lookup.suffix import Chains
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.candidates import choose_tree, merge_candidates
from vllm_redrafter.ops.suffix_lookup import suffix_lookup
from vllm_redrafter.options import ReDrafterOptions
from vllm_redrafter.tree.candidates import (
    ALL_SOURCE_NAMES,
    FROM_GRAMMAR,
    FROM_LOOKUP,
    Candidates,
    best_chains,
)
from vllm_redrafter.tree.grammar import Grown, Matcher, grow
from vllm_redrafter.tree.tree import NO_PARENT

# (hidden states [B, H], known tokens, kind) -> the drafted beams.
Draft = Callable[[Tensor, list[int], DraftShape], Beams]

# After so many looks in a row without an accepted token, only every so many steps have one: looking
# takes time too.
REST_AFTER, REST_EVERY = 8, 4

# Full drafts between two comparisons with smaller ones.
COMPARE_EVERY = 4

# Of a request with a grammar: the likeliest first tokens that the grammar is asked about, and how
# many paths in all. What is likely without it is often forbidden.
WIDE, ASKED = 64, 256


@dataclass(frozen=True)
class DraftInput:
    """What a draft may look at, for B requests.

    Attributes:
        requests: their names.
        context: ``[B, H]``, the hidden states that predicted the known tokens.
        known: the known tokens.
        text: ``[R, S]`` int32, token ids by batch row.
        rows: ``[B]`` int32, their batch rows.
        starts: ``[B]`` int32, where the tokens of their texts begin: embeddings are no tokens.
        lengths: ``[B]`` int32, tokens of their texts, the known ones included.
        temperatures: ``[B]`` float, 0 for a greedy request.
        max_depth: ``[B]`` int64, the deepest node that can be of use.
        most_nodes: of one request.
        most_rows: of all requests together, the known tokens' among them.
        matchers: by place in ``requests``, those of requests with a grammar.
    """

    requests: list[str]
    context: Tensor
    known: list[int]
    text: Tensor
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    temperatures: np.ndarray
    max_depth: np.ndarray
    most_nodes: int
    most_rows: int
    matchers: dict[int, Matcher] = field(default_factory=dict)


class Drafting:
    """Makes the trees of the next step.

    Args:
        options: the engine's.
        draft: runs the drafter.
        stats: counters.
        costs: of the budget; None for a fixed one.
        chains: only the best chain of each request is a candidate.
    """

    def __init__(
        self,
        options: ReDrafterOptions,
        draft: Draft,
        stats: Callable[[], ReDrafterStats],
        costs: CostModel | None = None,
        chains: bool = False,
    ) -> None:
        self._options, self._draft, self._stats = options, draft, stats
        self._chains = chains
        self._full: DraftShape = options.beam_width, options.draft_length
        self.costs = costs
        self.trust = {"drafter": Trust(), "lookup": Trust(), "grammar": Trust()}
        self._planner = None
        self._mean_context = 0.0
        self._doubt = Doubt()
        self._in_vain = 0
        self._full_drafts = 0
        self._step = 0
        if costs is not None:
            shapes = draft_shapes(*self._full)
            self._planner = DraftPlanner(shapes, self._planned_seconds)

    def __call__(self, given: DraftInput) -> list[RequestTree]:
        """One tree per request, ``NOTHING`` where none pays."""
        self._step += 1
        if self._rests():
            return [NOTHING] * len(given.requests)
        # An error ends a rest: the next step looks again, and errors come in a row.
        in_vain, self._in_vain = self._in_vain, 0
        trees = self._look(given)
        self._in_vain = in_vain + 1
        return trees

    def _look(self, given: DraftInput) -> list[RequestTree]:
        stats, batch = self._stats(), len(given.requests)
        self._mean_context = float(given.lengths.mean())
        shape = self._full if self._planner is None else self._planner.plan(batch)
        stats.draft_shapes[f"{shape[0]},{shape[1]}"] += 1
        beams, wide = None, None
        if shape != NO_DRAFT:
            with stats.timed("draft"):
                beams = self._draft(given.context, given.known, shape)
            if self.costs is not None:
                self.costs.observe_draft(shape, batch, stats.last_seconds["draft"])
            if given.matchers and given.most_nodes:
                # Timed as a draft, or the target's steps would be thought to be that much longer.
                with stats.timed("draft"):
                    rows = list(given.matchers)
                    known = [given.known[b] for b in rows]
                    wide = self._draft(given.context[rows], known, (WIDE, 1))
        if self._options.tree == "beams":
            with stats.timed("tree"):
                return self._beam_trees(beams, given)
        with stats.timed("lookup"):
            chains = self._look_up(given) if self._options.prompt_lookup else None
        with stats.timed("tree"):
            candidates = self._merge(given, beams, chains)
            if shape == self._full and beams is not None and self._planner is not None:
                self._compare(given, beams, chains, candidates)
            candidates = self._under_grammars(given, beams, wide, chains, candidates)
            counts = self._counts(given, shape, candidates)
            return _request_trees(candidates, counts)

    def _rests(self) -> bool:
        """Whether looking for candidates is left out: lately it was in vain."""
        resting = self.costs is not None and self._in_vain >= REST_AFTER
        return resting and self._step % REST_EVERY != 0

    def _beam_trees(self, beams: Beams, given: DraftInput) -> list[RequestTree]:
        tree, masks = build_tree(beams, "beams", given.most_nodes)
        counts = (tree.num_nodes - 1).tolist()
        return [
            RequestTree(tree.tokens[b, 1:end].tolist(), tree.parents[b, 1:end].tolist(),
                        tree.depths[b, 1:end].numpy(), masks[b, :end].numpy())
            for b, end in enumerate(count + 1 for count in counts)
        ]  # fmt: skip

    def _look_up(self, given: DraftInput) -> Chains:
        rows, starts, lengths = map(torch.from_numpy, (given.rows, given.starts, given.lengths))
        return suffix_lookup(
            given.text, rows, starts, lengths, depth=self._options.prompt_lookup_num_tokens,
        )  # fmt: skip

    def _merge(
        self, given: DraftInput, beams: Beams | None, chains: Chains | None
    ) -> Candidates:
        root = torch.tensor(given.known, dtype=torch.int64)
        most, max_depth = given.most_nodes, torch.from_numpy(given.max_depth)
        if not self._chains:
            return merge_candidates(root, beams, chains, most, max_depth)
        paths = max(most, self._options.chain_paths)
        return best_chains(merge_candidates(root, beams, chains, paths, max_depth), most)

    def _under_grammars(
        self,
        given: DraftInput,
        beams: Beams | None,
        wide: Beams | None,
        chains: Chains | None,
        candidates: Candidates,
    ) -> Candidates:
        """The candidates, those of requests with a grammar chosen anew by what it allows.

        Args:
            wide: of these requests alone, one token deep.
        """
        rows = list(given.matchers)
        if not rows or not given.most_nodes:
            return candidates
        root = torch.tensor([given.known[b] for b in rows])
        deepest = torch.from_numpy(given.max_depth[rows])
        drafted = [
            merge_candidates(root, _rows(beams, rows), _rows(chains, rows), ASKED, deepest)
        ]
        if wide is not None:
            drafted.append(merge_candidates(root, wide, None, WIDE, deepest))
        out = Candidates(**{name: part.clone() for name, part in vars(candidates).items()})
        for i, b in enumerate(rows):
            paths = {}
            for some in reversed(drafted):
                paths |= _paths(some, i)
            grown = grow(
                paths, given.matchers[b], given.most_nodes, int(deepest[i]), FROM_GRAMMAR
            )
            _put(out, b, grown)
        return out

    def _compare(
        self, given: DraftInput, beams: Beams, chains: Chains | None, candidates: Candidates
    ) -> None:
        """What smaller drafts would have given, now and then."""
        assert self._planner is not None
        self._full_drafts += 1
        often = self._full_drafts <= ENOUGH or self._planner.looking
        if not often and self._full_drafts % COMPARE_EVERY:
            return
        of = {self._full: self._trusted(given, candidates, tries=False)}
        for shape in self._planner.shapes[1:]:
            smaller = None if shape == NO_DRAFT else greedy_chain(beams, shape[1])
            merged = self._merge(given, smaller, chains)
            of[shape] = self._trusted(given, merged, tries=False)
        self._planner.observe(of)

    def _counts(self, given: DraftInput, shape: DraftShape, candidates: Candidates) -> np.ndarray:
        """How many candidates of each request are verified."""
        if self.costs is None or self._planner is None:
            return _fixed(candidates.counts.numpy(), given.most_rows)
        probabilities = self._trusted(given, candidates)
        batch = len(given.requests)
        most = min(max(0, given.most_rows - batch), probabilities.size)
        seconds = self._doubt.seconds(self._step_seconds(batch, most))
        choice = choose(probabilities, seconds, self.costs.draft(shape, batch))
        return self._doubt.counts(choice)

    def _trusted(
        self, given: DraftInput, candidates: Candidates, tries: bool = True
    ) -> np.ndarray:
        """``[B, M]`` float64, probabilities as they came true lately."""
        kinds = list(map(kind_of, given.temperatures.tolist()))
        factors = {
            name: trust.factors(given.requests, self._step, kinds, tries)
            for name, trust in self.trust.items()
            if name != "grammar" or given.matchers
        }
        sources = candidates.sources.numpy()
        factor = np.where(
            sources == FROM_LOOKUP, factors["lookup"][:, None], factors["drafter"][:, None]
        )
        if "grammar" in factors:
            factor = np.where(sources == FROM_GRAMMAR, factors["grammar"][:, None], factor)
        trusted = np.minimum(np.exp(candidates.scores.numpy().astype(np.float64)) * factor, 1.0)
        # A path is no likelier than its beginning, whatever the factors are.
        return np.minimum.accumulate(trusted, axis=1)

    def _step_seconds(self, batch: int, most: int) -> np.ndarray:
        assert self.costs is not None
        rows = batch + np.arange(most + 1)
        return self.costs.step(rows, batch, rows * self._mean_context)

    def _planned_seconds(self, batch: int, shape: DraftShape) -> np.ndarray:
        assert self.costs is not None
        most = batch * self._options.num_speculative_tokens
        return self._step_seconds(batch, most) + self.costs.draft(shape, batch)

    def observe(
        self, request: str, tree: RequestTree, path: list[int], temperature: float
    ) -> None:
        """What of a request's tree was accepted."""
        if path:
            self._in_vain = 0
        if tree.sources is None or tree.probabilities is None:
            # Beams alone, in Apple's order; or rows that vLLM's scheduler padded with -1.
            if tree.tokens[:1] != [-1]:
                self._stats().watch.note(1, len(path))
            return
        alone = {"lookup": tree.sources == FROM_LOOKUP, "grammar": tree.sources == FROM_GRAMMAR}
        alone["drafter"] = ~(alone["lookup"] | alone["grammar"])
        on_path = [node - 1 for node in path]
        predicted = {name: float(tree.probabilities[of].sum()) for name, of in alone.items()}
        accepted = {name: int(of[on_path].sum()) for name, of in alone.items()}
        if alone["drafter"].any():
            self._stats().watch.note(1, accepted["drafter"])
        for name, trust in self.trust.items():
            if predicted[name]:
                kind = kind_of(temperature)
                factor = trust.factors([request], self._step, [kind])[0]
                self._stats().predicted_accepted += float(factor) * predicted[name]
                trust.observe(request, predicted[name], accepted[name], self._step, kind)
        self._count(tree, path)

    def _count(self, tree: RequestTree, path: list[int]) -> None:
        stats, sources = self._stats(), tree.sources
        for source, name in ALL_SOURCE_NAMES.items():
            stats.nodes_by_source[name] += int((sources == source).sum())
        for node in path:
            stats.accepted_by_source[ALL_SOURCE_NAMES[int(sources[node - 1])]] += 1

    def forget(self, request: str) -> None:
        """The request has ended."""
        for trust in self.trust.values():
            trust.forget(request)


def _fixed(counts: np.ndarray, most_rows: int) -> np.ndarray:
    """All candidates, evenly less where vLLM would schedule fewer rows."""
    share = max(0, most_rows // max(1, len(counts)) - 1)
    return np.minimum(counts, share) if counts.sum() + len(counts) > most_rows else counts


def _rows(of_batch: Beams | Chains | None, rows: list[int]) -> Any:
    """Some requests of a batch."""
    if of_batch is None:
        return None
    return replace(of_batch, **{name: part[rows] for name, part in vars(of_batch).items()})


def _paths(candidates: Candidates, b: int) -> dict[tuple[int, ...], tuple[float, int]]:
    """Log-probability and source of every candidate of a request, by its path."""
    paths: list[tuple[int, ...]] = []
    found = {}
    count = int(candidates.counts[b])
    rows = (candidates.tokens, candidates.parents, candidates.scores, candidates.sources)
    for token, parent, score, source in zip(*(r[b, :count].tolist() for r in rows), strict=True):
        paths.append((*(() if parent == NO_PARENT else paths[parent]), token))
        found[paths[-1]] = score, source
    return found


def _put(candidates: Candidates, b: int, grown: list[Grown]) -> None:
    """Replace a request's candidates."""
    place = {each.path: i for i, each in enumerate(grown)}
    for name, part in vars(candidates).items():
        if name not in ("root", "counts"):
            part[b] = {"parents": NO_PARENT, "scores": FILLER_SCORE}.get(name, 0)
    candidates.counts[b] = len(grown)
    for i, each in enumerate(grown):
        candidates.tokens[b, i] = each.path[-1]
        candidates.parents[b, i] = place.get(each.path[:-1], NO_PARENT)
        candidates.depths[b, i] = len(each.path)
        candidates.scores[b, i] = each.score
        candidates.sources[b, i] = each.source


def _request_trees(candidates: Candidates, counts: np.ndarray) -> list[RequestTree]:
    if not counts.any():
        return [NOTHING] * len(counts)
    tree, masks, chosen = choose_tree(candidates, torch.from_numpy(counts))
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    depths, bits = tree.depths.numpy(), masks.numpy()
    order = chosen.clamp(min=0)
    scores = candidates.scores.gather(1, order[:, 1:]).exp().numpy()
    sources = candidates.sources.gather(1, order[:, 1:]).numpy()
    return [
        RequestTree(
            tokens[b][1:end], parents[b][1:end], depths[b, 1:end], bits[b, :end],
            scores[b, : end - 1], sources[b, : end - 1],
        ) if end > 1 else NOTHING
        for b, end in enumerate(tree.num_nodes.tolist())
    ]  # fmt: skip
