# SPDX-License-Identifier: Apache-2.0
"""The black-box cases once more, with the engine's own hybrid drafts instead of an oracle's.

The lookup also sees what plain vLLM said, with mistakes, so that deep chains are accepted through
first and other branches; drafter, merge, budget of nodes, walk and moves are the engine's.
"""

from dataclasses import dataclass, replace

import pytest
from engine_cases.cases import CASES
from engine_cases.run import run_case

from engine_v1.engines import Comparison, Pair
from engine_v1.oracle import Oracle
from engine_v1.test_hybrid import KnownText
from vllm_redrafter.engine.v1 import drafting as module


@dataclass(frozen=True)
class HybridPair(Pair):
    """Plain vLLM, and ReDrafter with drafts of its own."""

    patch: pytest.MonkeyPatch = None
    knows: type = KnownText

    def run(self, prompts, params, *, seed=0, answers=None, prefixes=True, **of_an_oracle):
        self.plain.reset(prefixes=prefixes)
        expected = self.plain.generate(prompts, params)
        self.trees.reset(prefixes=prefixes)
        known = expected if answers is None else answers
        self.patch.setattr(module, "suffix_lookup", self.knows(known, seed))
        got = self.trees.generate(prompts, params)
        return Comparison(self, Oracle(known, 1, range(2)), expected, got)


@pytest.fixture
def make_hybrid_pair(make_pair, monkeypatch):
    def make(**settings):
        pair = make_pair(**settings)
        return HybridPair(pair.plain, pair.trees, monkeypatch)

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(make_hybrid_pair, case):
    # Few of a case's steps branch; in test_hybrid.py many do.
    run_case(replace(case, moves=0, accepted=0.1), make_hybrid_pair, "v1")
