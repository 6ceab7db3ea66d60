# SPDX-License-Identifier: Apache-2.0
"""Full CUDA graphs, emulated: vLLM's own manager captures and dispatches, a replay has no Python.

See ``emulated_graphs``.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_v1.engines import answers
from engine_v1.tiny_target import prompts
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from engine_v2.own_process.emulated_graphs import Address, EmulatedGraph, GoneError, patch_torch
from engine_v2.own_process.engines import engine

GREEDY = SamplingParams(temperature=0, max_tokens=16)
SIZES = (1, 2, 4, 8)  # requests


@pytest.fixture
def captured(monkeypatch):
    """Within it, the engine with trees has full graphs; gives their manager."""

    @contextlib.contextmanager
    def capture(pair, sizes=SIZES):
        runner = pair.trees.runner
        rows, config = pair.trees.most_nodes + 1, runner.vllm_config
        compilation = config.compilation_config
        with monkeypatch.context() as patch:
            patch_torch(patch)
            all_sizes = [*sizes, *(n * rows for n in sizes)]
            patch.setattr(compilation, "cudagraph_capture_sizes", all_sizes)
            patch.setattr(compilation, "max_cudagraph_capture_size", sizes[-1] * rows)
            manager = ModelCudaGraphManager(
                config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=rows
            )
            patch.setattr(runner, "cudagraph_manager", manager)
            for layer in compilation.static_forward_context.values():
                patch.setattr(layer, "use_direct_call", True)
            manager.capture(
                runner.model, runner.model_state, runner.input_buffers, None,
                runner.block_tables, runner.attn_groups, runner.kv_cache_config,
            )  # fmt: skip
            yield manager

    return capture


def replays(manager):
    return {desc.num_reqs: graph.replays for desc, graph in manager.graphs.items()}


def run(pair, count, **settings):
    return pair.run(prompts(count), GREEDY, **settings)


def test_equal_to_plain_vllm(pair, captured):
    """A batch of 6 is padded to 8; prompts, and drafts that are cut, run without a graph."""
    with captured(pair) as manager:
        for count in (6, 1):
            outcome = run(pair, count)
            outcome.assert_equal()
            outcome.assert_saw_trees(moves=3, accepted=1.5)
            assert replays(manager)[8 if count == 6 else 1] > 2
    assert set(replays(manager)) == set(SIZES)


def test_trees_beside_prompts(make_pair, captured):
    """Steps with and without a graph take turns over the same buffers."""
    pair = make_pair(max_num_batched_tokens=72)
    with captured(pair, sizes=(1, 2, 4)) as manager:
        outcome = pair.run(prompts(6, shortest=40, longest=120, seed=3), GREEDY)
        graphs = sum(replays(manager).values())
    outcome.assert_equal()
    outcome.assert_saw_trees(moves=10)
    assert 5 < graphs < pair.trees.stats["steps"] - 2


def test_drafts_by_graph(pair, target, taught_drafter, captured, monkeypatch):
    """The real drafter: as good as without graphs; of no use where a buffer moved."""
    trees = engine(
        target, taught_drafter, spec_beam_width=6, spec_draft_length=4,
        spec_num_speculative_tokens=15,
    )  # fmt: skip
    speculator, batch = trees.speculator, prompts(6)
    pair.plain.reset()
    expected = answers(pair.plain.generate(batch, GREEDY))
    with captured(SimpleNamespace(trees=trees)):
        speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
        speculator.capture()
        graphs = speculator._graphs
        try:
            trees.reset()
            assert answers(trees.generate(batch, GREEDY)) == expected
            good, replayed = trees.stats, replays(graphs)
            monkeypatch.setattr(graphs.buffers, "known", graphs.buffers.known.clone())
            trees.reset()
            assert answers(trees.generate(batch, GREEDY)) == expected
            stale = trees.stats
        finally:
            speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
    assert set(replayed) == set(SIZES) and replayed[8] > 2, replayed
    assert good["acceptance_length"] > 1.5, good
    assert stale["acceptance_length"] < good["acceptance_length"] - 0.3, stale


@pytest.mark.parametrize("what", ["context_lens", "masks"])
def test_a_buffer_that_moves_is_seen(pair, captured, monkeypatch, what):
    """The step is written to new tensors; the graph has the old ones."""
    rows = pair.trees.state.rows
    with captured(pair) as manager:
        with monkeypatch.context() as patch:
            kept = getattr(rows, what)
            patch.setattr(rows, what, kept.clone())
            assert not run(pair, 3).equal
            assert max(replays(manager).values()) > 3


def test_a_buffer_that_is_gone_is_seen(pair, captured, monkeypatch):
    """Step tensors of the capture that nobody keeps."""
    rows = pair.trees.state.rows
    original = type(rows).uniform

    def fresh(self, *args):
        step = original(self, *args)
        return replace(step, context_lens=step.context_lens.clone())

    monkeypatch.setattr(type(rows), "uniform", fresh)
    with captured(pair) as manager:
        for graph in manager.graphs.values():
            with pytest.raises(GoneError):
                graph.replay()


def test_the_emulation():
    """It sees views, writes, moved and dead tensors, and host reads."""
    x, y = torch.ones(4), torch.zeros(4)
    scale = torch.tensor(3.0)
    graph = EmulatedGraph()
    with graph:
        product = x[1:] * 2
        product.add_(1)
        y[1:].copy_(product.reshape(3) * scale)
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [0, 33, 33, 33]
    x = torch.zeros(4)
    with pytest.raises(GoneError):
        graph.replay()
    with pytest.raises(RuntimeError, match="reads the device"), EmulatedGraph():
        y.sum().item()
    assert Address.of(y).tensor().data_ptr() == y.data_ptr()
