# SPDX-License-Identifier: Apache-2.0
"""What vLLM's GPU worker does before the first request; its CPU worker does none of it."""

import pytest
from engine_v1.tiny_target import prompts
from vllm import SamplingParams
from vllm.v1.worker.gpu.warmup import warmup_kernels

from engine_v2.own_process.engines import SPEC, Pair, engine
from engine_v2.own_process.gpu_start_up import start_as_on_a_gpu
from vllm_redrafter.engine.v2.sampler import TreeSampler

GREEDY = SamplingParams(temperature=0, max_tokens=16)
ROWS = 1 + SPEC["spec_num_speculative_tokens"]


def warm_up(pair):
    runner = pair.trees.runner
    pair.trees.reset()
    # The runner hears with the next step what has finished; the warm-up takes every slot.
    for request in list(runner.req_states.req_id_to_index):
        runner._remove_request(request)
    warmup_kernels(runner, runner.execute_model, runner.sample_tokens)


@pytest.mark.parametrize("greedy", [False, True], ids=["everything", "greedy"])
def test_vllms_warm_up(pair, monkeypatch, greedy):
    """Requests that ask for everything have chains; greedy ones, of vLLM 0.33 alone, have trees."""
    if greedy:
        params = SamplingParams(temperature=0)
        monkeypatch.setattr(SamplingParams, "for_sampler_warmup", lambda: params)
    steps, decide = [], TreeSampler.__call__

    def watch(sampler, logits, batch, *args):
        steps.append(batch.num_scheduled_tokens.tolist())
        return decide(sampler, logits, batch, *args)

    monkeypatch.setattr(TreeSampler, "__call__", watch)
    warm_up(pair)
    # All requests with drafts, one beside one without, one alone.
    assert steps[:3] == [[ROWS] * 8, [ROWS, 1], [ROWS]]
    stats = pair.trees.stats
    assert stats["drafts"] >= 10
    assert stats["fallbacks"] == ({} if greedy else {"penalties (chain)": 8})
    assert greedy == (stats["nodes_per_draft"] == ROWS - 1)
    # Nothing of it is left.
    pair.run(prompts(6), GREEDY).assert_equal()


def test_a_sampler_without_what_the_warm_up_asks(pair, monkeypatch):
    monkeypatch.delattr(TreeSampler, "enable_adaptive_verification")
    with pytest.raises(AttributeError, match="enable_adaptive_verification"):
        warm_up(pair)


def test_a_start_as_on_a_gpu(pair, target, drafter, monkeypatch):
    """Profiled, warmed up and captured twice, of which the first time is thrown away."""
    counts = (1, 2, 4)
    start_as_on_a_gpu(monkeypatch, [*counts, *(count * ROWS for count in counts)])
    trees = engine(target, drafter, max_num_seqs=4, **SPEC)
    untouched = {"steps": 0, "drafts": 0, "moves": 0, "replaced": 0, "fallbacks": {}}
    assert untouched.items() <= trees.stats.items()
    outcome = Pair(pair.plain, trees).run(prompts(4), SamplingParams(temperature=0, max_tokens=30))
    outcome.assert_equal()
    outcome.assert_saw_trees()
    speculator = trees.speculator
    managers = [trees.runner.cudagraph_manager, speculator._graphs, speculator._accept_graphs]
    for manager in managers:
        replays = {desc.num_reqs: graph.replays for desc, graph in manager.graphs.items()}
        assert set(replays) == set(counts)
        # An oracle drafts here, so the drafter's graphs wait.
        assert (sum(replays.values()) > 3) == (manager is not speculator._graphs), replays
