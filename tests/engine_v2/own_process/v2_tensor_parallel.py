# SPDX-License-Identifier: Apache-2.0
"""Two ranks share the target on Model Runner V2: one first rank's tree, one output."""

import importlib
import types

import pytest
from engine_v1.engines import answers
from engine_v1.ranks import FEW, RankedEngine
from engine_v1.tiny_target import EOS, prompts
from vllm import SamplingParams
from vllm.config import CUDAGraphMode

from engine_v2.own_process.emulated_graphs import patch_torch
from engine_v2.own_process.engines import V2Oracle
from vllm_redrafter.engine import draft_guard

NODES = 10
KINDS = [{"temperature": 0}, {"temperature": 1.0, "seed": 1, "top_p": 0.9, "top_k": 40}]


def prepare(worker):
    """In every worker: what the interpreter needs there too."""
    importlib.import_module("engine_v2.own_process.fixtures")


def reset(worker, oracles, agree):
    """In every worker: forget counters; ``oracles[rank]`` drafts, or the drafter."""
    runner = worker.model_runner
    speculator = runner.speculator
    runner.model_state.stats.reset()
    speculator._several_ranks = agree
    vars(speculator).pop("_draft_trees", None)
    if oracles is not None:
        view = types.SimpleNamespace(runner=runner, most_nodes=NODES)
        oracle = oracles[worker.rank]
        speculator._draft_trees = lambda context, known, batch, nodes: oracle.draft(
            view, context, known, batch
        )


def capture(worker):
    """In every worker: emulated graphs of drafting and accepting, which refuse to hold messages."""
    runner = worker.model_runner
    compilation = runner.vllm_config.compilation_config
    with pytest.MonkeyPatch.context() as patch:
        patch_torch(patch)
        patch.setattr(compilation, "cudagraph_capture_sizes", [1, 2, 4])
        patch.setattr(compilation, "max_cudagraph_capture_size", 4)
        runner.speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
        runner.speculator.capture()


def replayed(worker):
    """In every worker: how many drafts, and how many steps accepted, by graph."""
    speculator = worker.model_runner.speculator
    return [
        sum(graph.replays for graph in graphs.graphs.values())
        for graphs in (speculator._graphs, speculator._accept_graphs)
    ]


def break_drafts(worker, ranks):
    """In every worker: drafting fails on some ranks; guards are as after the start."""
    speculator = worker.model_runner.speculator
    guard = speculator.draft_guard
    guard.__init__(guard._stats)
    guard.serving, speculator._agreements = True, 0
    draft_guard.ERRORS_IN_A_ROW = FEW
    importlib.import_module("vllm_redrafter.engine.v2.speculator").ASK_EVERY = 4
    if worker.rank in ranks:

        def fail(*args):
            raise RuntimeError("a fault put here")

        speculator._draft_trees = fail


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
        oracles = seeds and [V2Oracle(expected, NODES, range(EOS), seed=s) for s in seeds]
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

    # By graphs, outside of which the first rank's trees are sent.
    trees.each_rank(capture)
    agreed, stats = run((0, 1), True)
    assert agreed == answers(expected)
    assert stats[0]["replaced"] == 0 and stats[1]["replaced"] > 5 and stats[0]["moves"] > 3
    assert trees.each_rank(replayed) == [[0, stats[0]["steps"]]] * 2
    assert run(None, True)[0] == answers(expected)
    one, other = trees.each_rank(replayed)
    assert one == other and one[0] > 5

    # No rank waits for another one, and all agree when the first one gives up.
    for ranks in ([0], [1]):
        trees.each_rank(reset, None, True)
        trees.each_rank(break_drafts, ranks)
        assert answers(trees.generate(batch, params)) == answers(expected)
        stats = trees.stats
        errors = [sum(one["draft_errors"].values()) for one in stats]
        assert max(errors) == FEW and errors[1 - ranks[0]] == 0
        assert [one["drafting_off"] for one in stats] == [ranks == [0]] * 2
        assert (stats[0]["drafts"] > 3) == (ranks == [1])
    trees.shutdown()
