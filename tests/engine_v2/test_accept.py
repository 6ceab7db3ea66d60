# SPDX-License-Identifier: Apache-2.0
"""Walk, emitted tokens and KV moves of a step: at once, and as an emulated CUDA graph."""

import importlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from engine_v2.host_tensors import HostTensors
from engine_v2.own_process.emulated_graphs import EmulatedGraph
from vllm_redrafter.engine.v2.accept import accept, kv_moves
from vllm_redrafter.engine.v2.accept_graphs import AcceptBuffers
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.tree_store import Drafted, TreeStore
from vllm_redrafter.ops.build_tree import _padded
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.tree.tree import Tree
from vllm_redrafter.tree.walk import walk_one

CPU = torch.device("cpu")
REQUESTS, NODES, BLOCK = 6, 7, 4
CAPTURED = 4  # requests of the graph
INPUTS = ("slots", "ends", "tokens", "drawn", "row_slots")


class World:
    """Trees of all request slots, two KV cache groups, counters."""

    def __init__(self, seed, depth=NODES):
        self.generator = torch.Generator().manual_seed(seed)
        self.store = TreeStore(REQUESTS, NODES, depth, CPU)
        self.caches = [torch.randn(16, 2, BLOCK, 3, generator=self.generator) for _ in range(4)]
        one, two, three, four = self.caches
        self.movers = [MoveKV([one], [two]), MoveKV([three], [four])]
        self.stats = DeviceStats(depth, CPU)

    def pick(self, most):
        return int(torch.randint(most + 1, (), generator=self.generator))

    def shuffled(self, count):
        return torch.randperm(count, generator=self.generator)

    def draft(self):
        """New trees; tokens of a tree are distinct, so a path is told by them."""
        tokens, parents = [], []
        for _ in range(REQUESTS):
            nodes = self.pick(NODES)
            tokens.append(self.shuffled(50)[: nodes + 1].tolist())
            parents.append([-1])
            depths = [0]
            while len(depths) <= nodes:
                parent = self.pick(len(depths) - 1)
                if depths[parent] < self.store.depth:
                    parents[-1].append(parent)
                    depths.append(depths[parent] + 1)
        tree = Tree.from_lists(tokens, parents)
        tree, masks = _padded(tree, tree.packed_mask(), NODES + 1)
        # All kinds; the store leaves out roots and padding.
        drafted = Drafted(tree, masks, 1 + tree.parents % 3)
        self.store.put(torch.arange(REQUESTS), drafted, torch.ones(REQUESTS, dtype=torch.bool))
        return tree

    def step(self, requests, tree):
        """Rows of a step, some drafts cut, and the target's tokens, often a child's."""
        slots = self.shuffled(REQUESTS)[:requests]
        tokens, drawn, ends = [], [], [0]
        for slot in slots.tolist():
            rows = 1 + self.pick(NODES)
            ends.append(ends[-1] + rows)
            tokens += tree.tokens[slot, :rows].tolist()
            for node in range(rows):
                children = (tree.parents[slot] == node).nonzero().flatten()
                wanted = 99
                if len(children) and self.pick(4):
                    wanted = int(tree.tokens[slot, children[self.pick(len(children) - 1)]])
                drawn.append(wanted)
        rows = SimpleNamespace(
            slots=slots.int(), tokens=torch.tensor(tokens).int(), ends=torch.tensor(ends).int()
        )
        row_slots = torch.stack([self.shuffled(16 * BLOCK)[: ends[-1]] for _ in range(2)])
        return rows, torch.tensor(drawn), row_slots

    def expected(self, rows, drawn, row_slots):
        """(emitted, last nodes, caches afterwards, rows moved), one request after the other."""
        emitted, last, moved = [], [], 0
        flat = [cache.transpose(1, 2).flatten(0, 1) for cache in self.caches]
        after = [cache.clone() for cache in flat]
        ends = rows.ends.tolist()
        for slot, first, end in zip(rows.slots.tolist(), ends, ends[1:], strict=False):
            count = min(int(self.store.num_nodes[slot]), end - first)
            said = drawn[first : first + count].tolist()
            parents = self.store.parents[slot, :count].tolist()
            path = walk_one(rows.tokens[first : first + count].tolist(), parents, said)
            emitted.append([said[0], *(said[node] for node in path)])
            last.append(path[-1] if path else 0)
            for depth, node in enumerate(path, start=1):
                moved += node != depth
                for i, cache in enumerate(after):
                    group = row_slots[i // 2]
                    cache[group[first + depth]] = flat[i][group[first + node]]
        return emitted, last, after, moved

    def found(self, accepted):
        """The same of what was computed."""
        counts = (accepted.walk.num_accepted + 1).tolist()
        for row, count in zip(accepted.emitted, counts, strict=True):
            assert not row[count:].any()
        emitted = [row[:n].tolist() for row, n in zip(accepted.emitted, counts, strict=True)]
        after = [cache.transpose(1, 2).flatten(0, 1) for cache in self.caches]
        return emitted, accepted.walk.last_node.tolist(), after


def same(found, expected):
    emitted, last, after, _ = expected
    caches = all(map(torch.equal, found[2], after))
    return found[0] == emitted and found[1] == last and caches


@pytest.mark.parametrize("depth", [NODES, 3])
@pytest.mark.parametrize("seed", range(8))
def test_as_one_request_after_the_other(seed, depth):
    world = World(seed, depth)
    rows, drawn, row_slots = world.step(5, world.draft())
    expected = world.expected(rows, drawn, row_slots)
    first, ends = rows.ends[:-1].long(), rows.ends[1:].long()
    got = accept(world.store, rows.slots, rows.tokens, drawn, first, ends - first)
    sources, targets, moved = kv_moves(got.walk.path, first, row_slots)
    for mover, source, target in zip(world.movers, sources, targets, strict=True):
        mover(source, target)
    assert same(world.found(got), expected)
    assert int(moved.sum()) == expected[3]
    assert got.walk.path.shape == (5, depth) and got.emitted.shape == (5, NODES + 1)


def captured(world):
    buffers = AcceptBuffers(REQUESTS, NODES, world.store.depth, 2, CPU)
    graph = EmulatedGraph()
    with graph:
        buffers.run(world.store, world.movers, world.stats, CAPTURED)
    return buffers, graph


def replay(world, buffers, graph, step):
    rows, drawn, row_slots = step
    buffers.drawn[: drawn.shape[0]].copy_(drawn)
    buffers.load(rows, row_slots, CAPTURED)
    graph.replay()
    return buffers.result(rows.slots.shape[0])


def test_replays_with_padding():
    """Steps of 1 to 4 requests take turns in one graph for 4; counters count the real ones."""
    world = World(1)
    buffers, graph = captured(world)
    moves, lengths, earlier, sources = 0, [], [], (Counter(), Counter())
    for requests in (4, 1, 3, 2, 4, 3, 1, 4):
        step = world.step(requests, world.draft())
        expected = world.expected(*step)
        got = replay(world, buffers, graph, step)
        assert same(world.found(got), expected)
        moves += expected[3]
        drafted = (got.num_nodes > 1).tolist()
        lengths += [len(said) - 1 for said, real in zip(expected[0], drafted, strict=True) if real]
        earlier.append((got.emitted, got.emitted.clone()))
        found = zip(step[0].slots, got.num_nodes.tolist(), got.walk.path.tolist(), strict=True)
        for slot, count, path in found:
            of_nodes = world.store.sources[slot].tolist()
            sources[0].update(of_nodes[1:count])
            sources[1].update(of_nodes[node] for node in path if node > 0)
    assert moves > 5 and sum(lengths) > 10, "nothing to see"
    assert int(world.stats.moves) == moves
    assert world.stats.accepted.tolist() == [lengths.count(n) for n in range(NODES + 1)]
    summary = world.stats.summary()
    for kind, name in enumerate(("nodes_by_source", "accepted_by_source")):
        assert summary[name] == {
            "drafter": sources[kind][1], "lookup": sources[kind][2], "both": sources[kind][3]
        }  # fmt: skip
        assert len(sources[kind]) == 3
    # Tokens that vLLM may still be copying are no later step's.
    assert all(torch.equal(kept, copy) for kept, copy in earlier)


@pytest.mark.parametrize("what", INPUTS)
def test_an_input_that_moves_is_seen(what):
    """Written to a new tensor; the graph has the old one."""
    world = World(2)
    buffers, graph = captured(world)
    old = getattr(buffers, what)  # kept, or it would be gone
    setattr(buffers, what, old.clone())
    outcomes = []
    for _ in range(4):
        step = world.step(4, world.draft())
        expected = world.expected(*step)
        outcomes.append(same(world.found(replay(world, buffers, graph, step)), expected))
    assert not all(outcomes)


def test_no_rows_do_nothing():
    """As at a capture after steps."""
    world = World(3)
    buffers, graph = captured(world)
    while not int(world.stats.moves):
        replay(world, buffers, graph, world.step(4, world.draft()))
    kept = (*world.caches, world.stats.accepted, world.stats.nodes, world.stats.moves)
    before = [tensor.clone() for tensor in kept]
    buffers.clear()
    buffers.run(world.store, world.movers, world.stats, REQUESTS)
    assert all(map(torch.equal, before, kept))


def test_nothing_comes_from_the_host(monkeypatch):
    monkeypatch.setattr(importlib.import_module("vllm_redrafter.ops.walk"), "has_kernel", bool)
    there, moved = torch.device("meta"), []
    store, stats = TreeStore(REQUESTS, NODES, 5, there), DeviceStats(5, there)
    buffers = AcceptBuffers(REQUESTS, NODES, 5, 2, there)
    movers = [lambda source, target: moved.extend([source.device, target.device])] * 2
    with HostTensors() as seen:
        buffers.run(store, movers, stats, CAPTURED)
    assert seen.found == [] and seen.calls > 40
    assert moved == [there] * 4
    with HostTensors() as seen:
        torch.where(buffers.drawn > 0, buffers.drawn, torch.tensor(1))
    assert "aten.where.self" in seen.found
