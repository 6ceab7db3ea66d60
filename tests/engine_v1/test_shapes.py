# SPDX-License-Identifier: Apache-2.0
"""Targets and caches of other shapes than the usual one."""

import pytest
from vllm import SamplingParams

from engine_v1.engines import Pair, engine
from engine_v1.tiny_target import prompts, write_target

GREEDY = SamplingParams(temperature=0, max_tokens=60)


@pytest.mark.parametrize(
    "shape",
    [
        # vLLM keeps heads that are no multiple of 32 in another layout.
        {"heads": 4, "kv_heads": 4, "head_dim": 80},
        {"heads": 8, "kv_heads": 1, "head_dim": 64},
        {"heads": 4, "kv_heads": 2, "head_dim": 128, "layers": 3},
        {"tied": True},
    ],
    ids=["heads of 80", "one kv head", "heads of 128", "tied head"],
)
def test_other_targets(drafter, tmp_path_factory, shape):
    target = write_target(tmp_path_factory.mktemp("models") / "target", seed=3, **shape)
    spec = {"spec_num_speculative_tokens": 15, "spec_beam_width": 4, "spec_draft_length": 4}
    pair = Pair(engine(target), engine(target, drafter, **spec))
    run = pair.run(prompts(12), GREEDY)
    run.assert_equal()
    run.assert_saw_trees()


@pytest.mark.parametrize("block_size", [64, 128])
def test_other_block_sizes(make_pair, block_size):
    pair = make_pair(block_size=block_size, num_gpu_blocks_override=40)
    run = pair.run(prompts(12), GREEDY)
    run.assert_equal()
    run.assert_saw_trees()


@pytest.mark.slow
def test_compiled(make_pair):
    """With torch.compile, which is vLLM's default; the other tests run eagerly."""
    pair = make_pair(enforce_eager=False)
    run = pair.run(prompts(12), GREEDY)
    run.assert_equal()
    run.assert_saw_trees()
