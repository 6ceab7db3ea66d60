# SPDX-License-Identifier: Apache-2.0
"""A drafter that knows the answer and hides it on some branch of a random tree.

A real drafter's first branch is nearly always the accepted one; then nothing shows whether the
other branches, the KV move or long paths work. This one makes all of them happen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vllm_redrafter.engine.v1.request_tree import RequestTree


def request_tree(tokens: Sequence[int], parents: Sequence[int]) -> RequestTree:
    """A RequestTree from lists without the root; depths and masks by definition, bit by bit."""
    depths, sees = [0], [1]
    for node, parent in enumerate(parents, start=1):
        depths.append(depths[parent] + 1)
        sees.append(sees[parent] | 1 << node)
    words = -(-len(sees) // 64)
    masks = np.array(
        [[row >> 64 * word & 0xFFFF_FFFF_FFFF_FFFF for word in range(words)] for row in sees],
        dtype=np.uint64,
    )
    return RequestTree(
        list(tokens), list(parents), np.array(depths[1:], dtype=np.int64), masks.view(np.int64)
    )


def random_tree(
    source: random.Random,
    truth: Sequence[int],
    most_nodes: int,
    vocab: Sequence[int],
    chain_first: bool = False,
) -> RequestTree:
    """A random tree that holds the first tokens of ``truth`` on one of its branches.

    Args:
        truth: what the target will say; none of it, some, or as much as fits is put into the tree.
        vocab: where distractors come from.
        chain_first: the true branch comes first, as a drafter's best beam does.
    """
    nodes = source.randint(1, most_nodes)
    true_nodes = source.randint(0, min(len(truth), nodes))
    slots = set(range(true_nodes) if chain_first else source.sample(range(nodes), true_nodes))
    tokens: list[int] = []
    parents: list[int] = []
    true_path = [0]
    held: list[set[int]] = [set()]
    for slot in range(nodes):
        if slot in slots:
            parent, token = true_path[-1], truth[len(true_path) - 1]
        else:
            # Half of the distractors hang on the true path, where they can mislead.
            choices = true_path if source.random() < 0.5 else range(len(held))
            parent = source.choice(choices)
            taken = held[parent]
            if parent in true_path and true_path.index(parent) < len(truth):
                taken = taken | {truth[true_path.index(parent)]}
            free = [token for token in vocab if token not in taken]
            if not free:
                continue
            token = source.choice(free)
        tokens.append(token)
        parents.append(parent)
        held[parent].add(token)
        held.append(set())
        if slot in slots:
            true_path.append(len(tokens))
    return request_tree(tokens, parents)


class Oracle:
    """Stands in for ``TreeRunnerMixin._draft_trees``.

    Args:
        outputs: finished vLLM ``RequestOutput`` objects: what the target says.
        most_nodes: the engine's ``num_speculative_tokens``.
        vocab: where distractors come from.
        chain_first: see ``random_tree``.
        chains: share of drafts that are a plain chain of the truth, longest possible.
        empty: share of drafts without any node.

    Attributes:
        contexts: if a list, receives (known token, hidden state) of every draft.
        unknown: drafts for which no output begins as the request did.
    """

    def __init__(
        self,
        outputs: Iterable[Any],
        most_nodes: int,
        vocab: Sequence[int],
        *,
        seed: int = 0,
        chain_first: bool = False,
        chains: float = 0.1,
        empty: float = 0.05,
    ) -> None:
        self._answers: dict[tuple[int, ...], list[list[int]]] = {}
        for output in outputs:
            answers = self._answers.setdefault(tuple(output.prompt_token_ids), [])
            answers += [list(completion.token_ids) for completion in output.outputs]
        self._most_nodes = most_nodes
        self._vocab = vocab
        self._source = random.Random(seed)
        self._chain_first = chain_first
        self._chains, self._empty = chains, empty
        self.contexts: list[tuple[int, Tensor]] | None = None
        self.unknown = 0

    def __call__(
        self, runner: Any, drafting: list[int], context: Tensor, known: list[int]
    ) -> list[RequestTree]:
        assert context.shape[0] == len(drafting) == len(known)
        trees = []
        for i, row, token in zip(drafting, context, known, strict=True):
            state = runner.requests[runner.input_batch.req_ids[i]]
            assert state.output_token_ids[-1] == token
            if self.contexts is not None:
                self.contexts.append((token, row.clone()))
            trees.append(self._tree(state.prompt_token_ids, state.output_token_ids))
        return trees

    def _tree(self, prompt: Sequence[int], output: Sequence[int]) -> RequestTree:
        kind = self._source.random()
        if kind < self._empty:
            return request_tree([], [])
        truth = self._truth(prompt, output)
        if kind < self._empty + self._chains and truth:
            chain = truth[: self._most_nodes]
            return request_tree(chain, range(len(chain)))
        return random_tree(self._source, truth, self._most_nodes, self._vocab, self._chain_first)

    def _truth(self, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
        known = list(output)
        fitting = [
            answer[len(known) :]
            for answer in self._answers.get(tuple(prompt), [])
            # The runner may be past the end of an answer: only the scheduler sees a stop token.
            if answer[: len(known)] == known[: len(answer)]
        ]
        if not fitting:
            self.unknown += 1
            return []
        return self._source.choice(fitting)
