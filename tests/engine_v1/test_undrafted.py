# SPDX-License-Identifier: Apache-2.0
"""Requests that get no draft say what they say in plain vLLM, beside requests that do."""

import pytest
from engine_cases import undrafted

from engine_v1.engines import engine

SPEC = {"spec_beam_width": 6, "spec_draft_length": 4, "spec_num_speculative_tokens": 15}


@pytest.fixture
def pair_for(target, taught_drafter):
    """Plain vLLM and ReDrafter, which drafts by itself."""

    def make(reason):
        more = undrafted.settings(reason)
        return engine(target, **more), engine(target, taught_drafter, **more, **SPEC)

    return make


def test_lora(pair_for, tmp_path):
    undrafted.check_lora(*pair_for(undrafted.LORA), undrafted.write_adapter(tmp_path))


def test_prompt_embeddings_and_thinking_budgets(pair_for, target):
    undrafted.check_embeddings_and_budgets(*pair_for(undrafted.THINKING), target)
