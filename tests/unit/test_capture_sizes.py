# SPDX-License-Identifier: Apache-2.0
"""For which numbers of query rows CUDA graphs are captured."""

import pytest

from vllm_redrafter.engine.capture_sizes import MOST_REQUESTS, capture_sizes
from vllm_redrafter.options import ReDrafterOptions


def trees_of(rows):
    """Options for trees of that many rows."""
    return ReDrafterOptions(model="m", num_speculative_tokens=rows - 1)


def test_a_tree_of_32_nodes_has_graphs_for_64_requests():
    """vLLM's own sizes end at 512 rows, 15 requests."""
    sizes = capture_sizes(trees_of(33), None, None)
    for requests in (1, 2, 4, 8, 16, 24, 32, 56, 64):
        assert 33 * requests in sizes
    assert sizes[-1] == 33 * MOST_REQUESTS
    assert sizes == sorted(set(sizes))


def test_steps_with_prompts_keep_vllms_sizes():
    sizes = capture_sizes(trees_of(33), None, None)
    assert {1, 2, 4, 8, 16, 248, 256, 272, 512} <= set(sizes)


@pytest.mark.parametrize("requests", [1, 3, 5, 64, 100])
def test_not_for_more_requests_than_there_can_be(requests):
    sizes = capture_sizes(trees_of(16), requests, None)
    assert 16 * min(requests, MOST_REQUESTS) in sizes
    assert max(sizes) <= max(16 * min(requests, MOST_REQUESTS), min(512, 2 * 16 * requests))


def test_not_above_the_budget():
    assert max(capture_sizes(trees_of(16), None, 300)) <= 300


def test_fewer_nodes_for_more_requests():
    options = ReDrafterOptions(
        model="m",
        num_speculative_tokens=15,
        num_speculative_tokens_per_batch_size=((1, 2, 15), (3, 8, 4), (9, 64, 0)),
    )
    assert options.tree_rows(10) == [16, 16, 5, 5, 5, 5, 5, 5, 1, 1]
    sizes = capture_sizes(options, 64, None)
    assert {16, 32, 20, 40, 24, 64} <= set(sizes)
    assert max(sizes) == 512
