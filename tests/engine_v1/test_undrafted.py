# SPDX-License-Identifier: Apache-2.0
"""Requests that get no draft say what they say in plain vLLM, beside requests that do."""

from engine_cases import undrafted

from engine_v1.engines import engine


def test_prompt_embeddings_and_thinking_budgets(target, taught_drafter):
    plain, trees = undrafted.engines(engine, target, taught_drafter)
    undrafted.check_embeddings_and_budgets(plain, trees, target)
