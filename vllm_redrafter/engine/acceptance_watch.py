# SPDX-License-Identifier: Apache-2.0
"""Says once that hardly anything of the drafter's is accepted: nothing else would show it.

A drafter of another target, or a target that was fine-tuned since, costs time and changes no
output. What the lookup found is not counted here: it would hide the drafter.
"""

from __future__ import annotations

import logging

from vllm_redrafter.engine.first_rank import is_first_rank

logger = logging.getLogger("vllm.vllm_redrafter")

# So many drafts are looked at together; fewer accepted tokens per draft than this are hardly any.
# The committed drafter brings 0.5 and more, and text of random tokens 0.01.
WINDOW, HARDLY_ANY = 1000, 0.05


class AcceptanceWatch:
    """Counts the drafts that hold nodes of the drafter, and how many of these were accepted."""

    def __init__(self) -> None:
        self._drafts = self._accepted = 0
        self._said = False

    def note(self, drafts: int, accepted: int) -> None:
        """``drafts`` more were verified, ``accepted`` of the drafter's nodes in them were right."""
        if self._said:
            return
        self._drafts += drafts
        self._accepted += accepted
        if self._drafts < WINDOW:
            return
        per_draft, drafts = self._accepted / self._drafts, self._drafts
        self._drafts = self._accepted = 0
        if per_draft < HARDLY_ANY:
            self._said = True
            if _speaks():
                logger.warning(
                    "The acceptance length of ReDrafter's drafter stays near 1.0: %.3f tokens per "
                    "step in the last %d drafts (what the lookup found is not counted). Check that "
                    "the drafter was trained for this target as it is now, that prompts use the "
                    "chat template, and that the temperature is not very high; if all is so, plain "
                    "vLLM is faster (logged once).",
                    1 + per_draft,
                    drafts,
                )


def _speaks() -> bool:
    try:
        return is_first_rank()
    except AssertionError:  # vLLM's groups of ranks are not there: no engine, one process
        return True
