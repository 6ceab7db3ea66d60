# SPDX-License-Identifier: Apache-2.0
"""How far predicted probabilities can be trusted, per request.

Probabilities were fitted to greedy answers of other prompts. At a high temperature, or for text of
another kind, less is accepted: what was accepted divided by what was predicted, per source, mends
that. A request that is not trusted enough for nodes is tried again after a number of steps, which
doubles with every try in vain: no estimate stays for ever, and trying costs little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PRIOR = 6.0  # predicted tokens that a new request's own evidence is weighed against
FADE, FADE_OF_ALL = 0.97, 0.99  # of the evidence so far, per step that adds to it
LOWEST, HIGHEST = 0.02, 1.6
TRY_AFTER, TRY_AT_LEAST_AFTER = 8, 64  # steps without evidence
HOPELESS = 0.3  # where no more than this came true


@dataclass
class Evidence:
    """Sums that fade with every step that adds to them.

    Attributes:
        predicted: probabilities of the nodes that were verified.
        accepted: how many of them were accepted.
        step: when they were added to last.
        wait: steps from there to the next try.
        fade: of the sums, per step that adds to them.
    """

    predicted: float = 0.0
    accepted: float = 0.0
    step: int = 0
    wait: int = TRY_AFTER
    fade: float = FADE

    def add(self, predicted: float, accepted: float, step: int) -> None:
        fade = self.fade if step > self.step else 1.0
        if accepted:
            self.wait = TRY_AFTER
        elif self.is_due(step):
            self.wait = min(2 * self.wait, TRY_AT_LEAST_AFTER)
        self.predicted = fade * self.predicted + predicted
        self.accepted = fade * self.accepted + accepted
        self.step = step

    def is_due(self, step: int) -> bool:
        """Whether nothing has been verified for so long that it is time for a try."""
        return step - self.step >= self.wait

    def ratio(self, prior: float) -> float:
        """accepted / predicted, ``prior`` where there is little evidence."""
        ratio = (self.accepted + PRIOR * prior) / (self.predicted + PRIOR)
        return min(HIGHEST, max(LOWEST, ratio))


@dataclass
class Trust:
    """Factors for one source of candidates, by request and over all that are drawn alike.

    Attributes:
        everyone: evidence by kind of sampling (``kind_of``): what is known of one that draws at a
            high temperature says nothing of a greedy one.
        requests: a request's own evidence.
    """

    everyone: dict[int, Evidence] = field(default_factory=dict)
    requests: dict[str, Evidence] = field(default_factory=dict)

    def observe(
        self, request: str, predicted: float, accepted: int, step: int, kind: int = 0
    ) -> None:
        """Nodes of a request were verified in this step."""
        self._known(request, step).add(predicted, accepted, step)
        everyone = self.everyone.setdefault(kind, Evidence(fade=FADE_OF_ALL))
        everyone.add(predicted, accepted, step)

    def factors(
        self,
        requests: Sequence[str],
        step: int,
        kinds: Sequence[int] | None = None,
        tries: bool = True,
    ) -> np.ndarray:
        """``[B]``, what predicted probabilities are multiplied by; without tries, as is known."""
        kinds = [0] * len(requests) if kinds is None else kinds
        general = {
            kind: self.everyone[kind].ratio(1.0) if kind in self.everyone else 1.0
            for kind in set(kinds)
        }
        return np.array([
            self._factor(self._known(request, step, general[kind]), general[kind], step, tries)
            for request, kind in zip(requests, kinds, strict=True)
        ])  # fmt: skip

    def _factor(self, evidence: Evidence, prior: float, step: int, tries: bool) -> float:
        ratio = evidence.ratio(prior)
        return max(1.0, ratio) if tries and evidence.is_due(step) else ratio

    def _known(self, request: str, step: int, prior: float = 1.0) -> Evidence:
        """A request's evidence. Where others like it gave nothing, a new one is tried late."""
        if request not in self.requests:
            wait = TRY_AFTER if prior > HOPELESS else TRY_AT_LEAST_AFTER
            self.requests[request] = Evidence(step=step, wait=wait)
        return self.requests[request]

    def forget(self, request: str) -> None:
        """The request has ended."""
        self.requests.pop(request, None)


def kind_of(temperature: float) -> int:
    """Requests of the same kind of sampling: greedy ones, or by halves of a degree."""
    return math.ceil(2 * max(0.0, min(temperature, 4.0)))
