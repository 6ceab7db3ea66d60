# SPDX-License-Identifier: Apache-2.0
"""Sessions with streamed input say in every turn what they say without drafts."""

import pytest
from engine_cases import sessions


@pytest.mark.parametrize("kind", sessions.KINDS)
def test_sessions(pair, kind):
    sessions.check(pair, kind)
    # Nothing is kept of sessions that are over.
    assert not pair.trees.runner._trees and not pair.trees.scheduler.requests


@pytest.mark.parametrize("kind", sessions.KINDS)
def test_control_a_walk_that_takes_one_token_too_many(pair, kind, monkeypatch):
    """As vLLM's own methods do, whose sessions differ as well; more would end the scheduler."""
    honest = pair.trees.runner._endings

    def late(step):
        ends = honest(step)
        return lambda i, said: len(said) > 1 and ends(i, said[:-1])

    monkeypatch.setattr(pair.trees.runner, "_endings", late)
    assert not sessions.same(*sessions.compare(pair, kind))
