# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_undrafted.py`` on Model Runner V2, but for LoRA, which is refused there."""

import pytest
from engine_cases import undrafted

from engine_v2.own_process.engines import engine

SPEC = {"spec_beam_width": 6, "spec_draft_length": 4, "spec_num_speculative_tokens": 15}


@pytest.fixture
def pair_for(target, taught_drafter):
    """Plain vLLM and ReDrafter, which drafts by itself."""

    def make(reason):
        more = undrafted.settings(reason)
        return engine(target, **more), engine(target, taught_drafter, **more, **SPEC)

    return make


def test_prompt_embeddings_and_thinking_budgets(pair_for, target):
    undrafted.check_embeddings_and_budgets(*pair_for(undrafted.THINKING), target)
