# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_sessions.py`` on Model Runner V2."""

import pytest
from engine_cases import sessions

from vllm_redrafter.engine.v2.endings import Endings

# The interpreter is slow.
SMALL = (3, 3)


@pytest.mark.parametrize("kind", ["max_tokens 6", "stop tokens"])
def test_sessions(pair, kind):
    sessions.check(pair, kind, size=SMALL)
    assert not pair.trees.stats["fallbacks"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["max_tokens 7", "seeded"])
def test_more_sessions(pair, kind):
    sessions.check(pair, kind, size=SMALL)


@pytest.fixture(scope="module")
def synchronous(make_pair):
    return make_pair(async_scheduling=False)


@pytest.mark.slow
def test_sessions_without_async_scheduling(synchronous):
    sessions.check(synchronous, "stop tokens", size=SMALL)


@pytest.mark.slow
def test_control_a_walk_that_takes_one_token_too_many(synchronous, monkeypatch):
    """With asynchronous scheduling vLLM itself steps back before what it threw away."""
    honest = Endings.cut

    def late(self, slots, found, said):
        cut = honest(self, slots, found, said)
        one_more = cut.num_accepted < found.num_accepted
        accepted = cut.num_accepted + one_more
        path = found.path.where(
            cut.path.new_tensor(range(cut.path.shape[1])) < accepted[:, None], -1
        )
        last = path.gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]
        return type(cut)(
            path=path, num_accepted=accepted, last_node=last.where(accepted > 0, 0),
            next_token=said.gather(1, accepted[:, None])[:, 0],
        )  # fmt: skip

    monkeypatch.setattr(Endings, "cut", late)
    assert not sessions.same(*sessions.compare(synchronous, "stop tokens", SMALL))
