# SPDX-License-Identifier: Apache-2.0
"""Data parallelism on Model Runner V1."""

import pytest
from engine_cases.replicas import check_two_replicas


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_replicas(pair, target, taught_drafter, tmp_path):
    check_two_replicas(pair.plain, target, taught_drafter, tmp_path)
