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
from vllm.distributed.parallel_state import get_tp_group
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from engine_v2.own_process.emulated_graphs import Address, EmulatedGraph, GoneError, patch_torch
from engine_v2.own_process.engines import DRAFTER_ALONE, engine
from engine_v2.own_process.host_reads import HostReads
from engine_v2.own_process.v2_hybrid import only, repetitive

GREEDY = SamplingParams(temperature=0, max_tokens=16)
SIZES = (1, 2, 4, 8)  # requests


@pytest.fixture
def captured(monkeypatch):
    """Within it, the engine has graphs of steps, drafts and accepting; gives the steps' manager."""

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
            speculator = pair.trees.speculator
            speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
            try:
                speculator.capture()
                yield manager
            finally:
                speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
                assert pair.trees.state.tree_sampler.graphs() is None

    return capture


@pytest.fixture
def watched(monkeypatch):
    """Starts a list of (requests, whether nothing was left to the host) of the steps with trees."""

    def watch(pair):
        sampler, steps = pair.trees.state.tree_sampler, []
        accept = sampler._accept

        def noting(parts, rows, dims, batch):
            steps.append((len(rows.slots_np), dims is None and rows.invalid is None))
            return accept(parts, rows, dims, batch)

        monkeypatch.setattr(sampler, "_accept", noting)
        return steps

    return watch


def accepted_by_graph(pair):
    return replays(pair.trees.speculator._accept_graphs)


def replays(manager):
    return {desc.num_reqs: graph.replays for desc, graph in manager.graphs.items()}


def run(pair, count, **settings):
    return pair.run(prompts(count), GREEDY, **settings)


def test_equal_to_plain_vllm(pair, captured):
    """A batch of 6 is padded to 8; prompts, and drafts that are cut, run without a graph."""
    seen = {}
    with captured(pair) as manager:
        for count in (6, 1):
            outcome = run(pair, count)
            outcome.assert_equal()
            outcome.assert_saw_trees(moves=3, accepted=1.5)
            assert replays(manager)[8 if count == 6 else 1] > 2
            seen[count] = accepted_by_graph(pair), pair.trees.stats["steps"]
    assert set(seen[6][0]) == set(SIZES) and seen[6][0][8] > 2 < seen[1][0][1]
    # Every step with trees, whether the target's graph served it or not.
    assert sum(seen[6][0].values()) == seen[6][1]
    assert sum(seen[1][0].values()) == seen[6][1] + seen[1][1]
    assert set(replays(manager)) == set(SIZES)


def test_trees_beside_prompts(make_pair, captured, watched):
    """Steps with and without a graph take turns over the same buffers."""
    pair = make_pair(max_num_batched_tokens=72)
    steps = watched(pair)
    with captured(pair, sizes=(1, 2, 4)) as manager:
        outcome = pair.run(prompts(6, shortest=40, longest=120, seed=3), GREEDY)
        graphs = sum(replays(manager).values())
        accepting = sum(accepted_by_graph(pair).values())
    outcome.assert_equal()
    outcome.assert_saw_trees(moves=10)
    assert 5 < graphs < pair.trees.stats["steps"] - 2
    # What is accepted by graph may stand beside prompts; for more than 4 requests there is none.
    assert accepting == sum(requests <= 4 for requests, _ in steps) >= graphs


def test_drafts_by_graph(pair, target, taught_drafter, captured, monkeypatch):
    """The real drafter: as good as without graphs; of no use where a buffer moved."""
    trees = engine(target, taught_drafter, **DRAFTER_ALONE)
    speculator, batch = trees.speculator, prompts(6)
    pair.plain.reset()
    expected = answers(pair.plain.generate(batch, GREEDY))
    with captured(SimpleNamespace(trees=trees)):
        graphs = speculator._graphs
        trees.reset()
        with HostReads() as reads:
            assert answers(trees.generate(batch, GREEDY)) == expected
        good, replayed = trees.stats, replays(graphs)
        monkeypatch.setattr(graphs.buffers, "known", graphs.buffers.known.clone())
        trees.reset()
        assert answers(trees.generate(batch, GREEDY)) == expected
        stale = trees.stats
    assert reads.found == []
    assert set(replayed) == set(SIZES) and replayed[8] > 2, replayed
    assert good["acceptance_length"] > 1.5, good
    assert stale["acceptance_length"] < good["acceptance_length"] - 0.3, stale


def test_the_lookup_by_graph(pair, hybrid, captured, monkeypatch):
    """Texts grow under the graph; and slots and numbers of nodes come from where it reads them."""
    batch, params = repetitive(3), [only(i, max_tokens=24) for i in range(3)]
    pair.plain.reset()
    expected = answers(pair.plain.generate(batch, params))
    with captured(SimpleNamespace(trees=hybrid), sizes=(1, 2, 4)):
        graphs = hybrid.speculator._graphs
        hybrid.reset()
        with HostReads() as reads:
            assert answers(hybrid.generate(batch, params)) == expected
        good, replayed = hybrid.stats, replays(graphs)
        stale = {}
        for moved in ("slots", "counts"):
            hybrid.reset()
            with monkeypatch.context() as patch:
                kept = getattr(graphs.buffers, moved)
                kept.zero_()
                patch.setattr(graphs.buffers, moved, kept.clone())
                assert answers(hybrid.generate(batch, params)) == expected
            stale[moved] = hybrid.stats["acceptance_length"]
    assert reads.found == []
    assert sum(replayed.values()) > 4, replayed
    assert good["acceptance_length"] > 2.5 and good["moves"] > 3, good
    assert len(good["accepted_by_depth"]) > 8, good
    assert stale["counts"] == 1 and stale["slots"] < good["acceptance_length"] - 0.5, stale


def test_what_the_host_decides_runs_without_a_graph(pair, captured, watched, monkeypatch):
    """Logprobs and grammars; draws in parts do not matter."""
    monkeypatch.setattr(pair.trees.state.tree_sampler, "max_chunk_rows", 33)
    grammar = StructuredOutputsParams(regex="[a-d]{8}")
    kinds = {
        "parts": {"seed": 3},
        "logprobs": {"temperature": 0, "logprobs": 2},
        "grammar": {"temperature": 0, "structured_outputs": grammar},
    }
    steps = watched(pair)
    with captured(pair):
        for name, kind in kinds.items():
            before = sum(accepted_by_graph(pair).values())
            steps.clear()
            outcome = pair.run(prompts(3), SamplingParams(max_tokens=8, **kind))
            outcome.assert_equal()
            by_graph = sum(accepted_by_graph(pair).values()) - before
            assert by_graph == sum(free for _, free in steps)
            # When all grammars have ended, a step that was begun before has none.
            assert by_graph == len(steps) > 1 if name == "parts" else by_graph < len(steps) - 1


@pytest.mark.parametrize("what", ["drawn", "row_slots"])
def test_a_buffer_of_accepting_that_moves_is_seen(pair, captured, monkeypatch, what):
    with captured(pair):
        buffers = pair.trees.speculator._accept_graphs.buffers
        with monkeypatch.context() as patch:
            kept = getattr(buffers, what)
            patch.setattr(buffers, what, kept.clone())
            assert not run(pair, 3).equal
        assert max(accepted_by_graph(pair).values()) > 3


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


def test_the_emulation(pair):
    """It sees views, writes, moved and dead tensors, host reads, and messages between ranks."""
    group = get_tp_group().device_group
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
    with pytest.raises(RuntimeError, match="waits for other ranks"), EmulatedGraph():
        torch.distributed.broadcast(y, src=0, group=group)
    assert Address.of(y).tensor().data_ptr() == y.data_ptr()
