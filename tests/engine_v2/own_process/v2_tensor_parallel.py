# SPDX-License-Identifier: Apache-2.0
"""Two ranks share the target on Model Runner V2: one first rank's tree, one output."""

import importlib
import types

import pytest
import torch
from engine_v1.engines import answers
from engine_v1.ranks import RankedEngine
from engine_v1.tiny_target import EOS, prompts
from vllm import SamplingParams

from engine_v2.own_process.engines import V2Oracle
from vllm_redrafter.engine.v2.stats import DeviceStats

NODES = 10
KINDS = [{"temperature": 0}, {"temperature": 1.0, "seed": 1, "top_p": 0.9, "top_k": 40}]


def prepare(worker):
    """In every worker: what the interpreter needs there too."""
    importlib.import_module("engine_v2.own_process.fixtures")


def reset(worker, oracles, agree):
    """In every worker: forget counters; ``oracles[rank]`` drafts."""
    runner = worker.model_runner
    state, speculator = runner.model_state, runner.speculator
    state.stats = state.tree_sampler.stats = DeviceStats(NODES, torch.device("cpu"))
    speculator._several_ranks = agree
    view = types.SimpleNamespace(runner=runner, most_nodes=NODES)
    oracle = oracles[worker.rank]
    speculator._draft_trees = lambda context, known, batch: oracle.draft(
        view, context, known, batch
    )


@pytest.mark.slow
def test_two_ranks(target, drafter):
    batch = prompts(4)
    params = [SamplingParams(max_tokens=12, **KINDS[i % 2]) for i in range(4)]
    settings = {"max_num_batched_tokens": 256, "kv_cache_memory_bytes": 16 << 20}
    plain = RankedEngine(target, **settings)
    plain.each_rank(prepare)
    expected = plain.generate(batch, params)
    plain.shutdown()

    trees = RankedEngine(
        target, drafter, **settings,
        spec={"num_speculative_tokens": NODES, "beam_width": 4, "draft_length": 4},
    )  # fmt: skip

    trees.each_rank(prepare)

    def run(seeds, agree):
        oracles = [V2Oracle(expected, NODES, range(EOS), seed=seed) for seed in seeds]
        trees.each_rank(reset, oracles, agree)
        outputs = trees.generate(batch, params)
        return answers(outputs), trees.stats

    same, stats = run((0, 0), True)
    assert same == answers(expected)
    assert stats[0] == stats[1]
    assert stats[0]["moves"] > 3 and stats[0]["acceptance_length"] > 1.5
    assert stats[0]["replaced"] == 0

    agreed, stats = run((0, 1), True)
    assert agreed == answers(expected)
    assert stats[0]["replaced"] == 0 and stats[1]["replaced"] > 5

    assert run((0, 0), False)[0] == answers(expected)
    assert run((0, 1), False)[0] != answers(expected), "the control sees nothing"
    trees.shutdown()
