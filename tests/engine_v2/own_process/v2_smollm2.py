# SPDX-License-Identifier: Apache-2.0
"""The demo's target and prompts, and the committed drafter, on Model Runner V2."""

import json
import os
from pathlib import Path

import pytest
from engine_cases.questions import (
    DRAFTER,
    ask,
    assert_real_answers,
    demo_prompts,
    settings,
    target,
)

from engine_v2.own_process.engines import engine


@pytest.mark.slow
def test_demo_prompts():
    common = settings(4) | {"kv_cache_memory_bytes": 1 << 30}
    trees = engine(target(), DRAFTER, **common)
    expected = ask(engine(target(), **common), demo_prompts(), 24)
    got = ask(trees, demo_prompts(), 24)
    assert got == expected
    assert_real_answers(got, trees.stats)
    # Compared with Model Runner V1's in engine_v1/test_smollm2.py.
    folder = Path(os.environ["REDRAFTER_TEST_STREAMS"])
    (folder / "smollm2.json").write_text(json.dumps(got), encoding="utf-8")
