# SPDX-License-Identifier: Apache-2.0
"""Where a request ends inside its tree, by the rules of vLLM's scheduler.

vLLM lets the worker go on behind the end, throws away what was said there, and for a request that
has ended that is enough. A session with streamed input goes on: its next turn begins where the
scheduler believes that tokens were computed, which must be right before the last token of the turn,
as without drafts. The worker cannot tell a session from another request, so every walk ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.utils import check_sequence_repetition


class Ending:
    """Whether a token ends a request, as ``check_stop`` of vLLM's scheduler decides.

    Args:
        params: the request's ``SamplingParams``.
        output: what it has said so far; copied.
        left: how many more tokens it may say.
    """

    def __init__(self, params: Any, output: Sequence[int], left: int) -> None:
        self._params, self._left = params, left
        self._output = list(output) if params.repetition_detection is not None else []
        self._said_before = len(output)

    def __call__(self, said: Sequence[int]) -> bool:
        """``said``: tokens of this step, at least one; the last one is asked about."""
        params, token = self._params, said[-1]
        if is_stop_token(token, params) or len(said) >= self._left:
            return True
        if params.repetition_detection is None:
            return False
        if self._said_before + len(said) < params.min_tokens:
            return False
        text = [*self._output, *said]
        return bool(check_sequence_repetition(text, params.repetition_detection))


def is_stop_token(token: int, params: Any) -> bool:
    """Whether nothing follows this token."""
    return token == params.eos_token_id or token in (params.stop_token_ids or ())
