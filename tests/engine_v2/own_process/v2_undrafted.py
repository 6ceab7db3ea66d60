# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_undrafted.py`` on Model Runner V2."""

from engine_cases import undrafted

from engine_v2.own_process.engines import engine


def test_prompt_embeddings_and_thinking_budgets(target, taught_drafter):
    plain, trees = undrafted.engines(engine, target, taught_drafter)
    undrafted.check_embeddings_and_budgets(plain, trees, target)
