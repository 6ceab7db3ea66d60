# SPDX-License-Identifier: Apache-2.0
"""Every step of a request as it was verified, for `vllm-redrafter show`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_redrafter.tree.candidates import FROM_DRAFTER, SOURCE_NAMES


@dataclass(frozen=True)
class RecordedStep:
    """One step of one request.

    Attributes:
        said: the tokens that it emitted: the accepted ones, then the target's next token.
        tokens: the drafted nodes, the root not among them; empty: nothing was drafted.
        parents: of each node, 0 for the root, i + 1 for the node of ``tokens[i]``.
        path: the accepted nodes in order, as numbers like those of ``parents``.
        sources: of each node, who drafted it: ``drafter``, ``lookup`` or ``both``.
        probabilities: of each node, that its path is accepted, as it was drafted; empty: not known.
    """

    said: list[int]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)


def record_steps(worker: Any) -> list[RecordedStep]:
    """Record what the worker's runner verifies from now on, one request at a time.

    Args:
        worker: of Model Runner V1, in this process (``LLM.collective_rpc`` hands it over).

    Returns:
        a list that grows by one with every step that emits tokens.
    """
    runner, steps = worker.model_runner, []
    propose = runner.propose_draft_token_ids

    def recorded(scheduler_output: Any, sampled: list[list[int]], *rest: Any, **more: Any) -> Any:
        step = runner._step
        if sampled and sampled[0]:
            tree = step.trees[0] if step is not None else None
            walked = step is not None and step.walk is not None
            steps.append(_recorded(list(sampled[0]), tree, step.walk.paths[0] if walked else []))
        return propose(scheduler_output, sampled, *rest, **more)

    runner.propose_draft_token_ids = recorded
    return steps


def _recorded(said: list[int], tree: Any, path: list[int]) -> RecordedStep:
    if tree is None:
        return RecordedStep(said)
    codes = [FROM_DRAFTER] * len(tree) if tree.sources is None else tree.sources.tolist()
    return RecordedStep(
        said=said,
        tokens=list(tree.tokens),
        parents=list(tree.parents),
        path=list(path),
        sources=[SOURCE_NAMES[code] for code in codes],
        probabilities=[] if tree.probabilities is None else tree.probabilities.tolist(),
    )
