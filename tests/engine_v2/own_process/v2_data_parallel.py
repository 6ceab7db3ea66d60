# SPDX-License-Identifier: Apache-2.0
"""Data parallelism on Model Runner V2."""

import pytest
from engine_cases.replicas import check_two_replicas


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_replicas(pair, target, taught_drafter, tmp_path):
    check_two_replicas(
        pair.plain, target, taught_drafter, tmp_path, requests=6, max_tokens=12,
        imports=["engine_v2.own_process.fixtures"], max_num_batched_tokens=256, block_size=32,
        kv_cache_memory_bytes=16 << 20,
    )  # fmt: skip
