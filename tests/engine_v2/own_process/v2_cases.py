# SPDX-License-Identifier: Apache-2.0
"""The black-box cases on Model Runner V2; what was said is kept for ``engine_v1/test_cases.py``."""

import json
import os
from pathlib import Path

import pytest
from engine_cases.cases import CASES
from engine_cases.run import run_case
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(make_pair, case):
    streams = run_case(case, make_pair, "v2")
    folder = Path(os.environ["REDRAFTER_TEST_STREAMS"])
    (folder / f"{case.name}.json").write_text(json.dumps(streams), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_without_async_scheduling(make_pair, case):
    def synchronous(**settings):
        pair = make_pair(async_scheduling=False, **settings)
        assert not isinstance(pair.trees.scheduler, AsyncScheduler)
        return pair

    run_case(case, synchronous, "v2")
