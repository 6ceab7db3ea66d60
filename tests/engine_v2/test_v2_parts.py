# SPDX-License-Identifier: Apache-2.0
"""Parts of the V2 engine that need no engine: the draft on the device, the store, fallbacks."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from engine_v1.tiny_target import HIDDEN, VOCAB, tiny_drafter

from engine_v2.host_tensors import HostTensors
from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.v2.draft import LayerwiseDraft, make_draft
from vllm_redrafter.engine.v2.draft_graphs import DraftBuffers
from vllm_redrafter.engine.v2.fallback import shape_of_request
from vllm_redrafter.engine.v2.hybrid import TextLookup, hybrid_trees
from vllm_redrafter.engine.v2.stats import DeviceStats
from vllm_redrafter.engine.v2.tree_store import Drafted, Shape, TreeStore
from vllm_redrafter.engine.v2.worker import TreeWorkerMixin
from vllm_redrafter.ops import draft as draft_op
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.draft import CompiledDraft
from vllm_redrafter.tree.tree import Tree, pack_bits

CPU = torch.device("cpu")
NAMES = ("parents", "depths", "masks", "sources", "num_nodes")


EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3))


def bound_drafter():
    made = tiny_drafter()
    made.embedding = EMBEDDING
    return made


@pytest.fixture(scope="module")
def drafter():
    return bound_drafter()


SETTINGS = pytest.mark.parametrize("width, length, top_k", [(4, 3, 0), (1, 4, 0), (6, 2, 5)])
CONTEXT = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5))
TOKEN = torch.tensor([1, 7, 30])


@SETTINGS
def test_the_draft_is_the_beam_search(drafter, width, length, top_k):
    got = LayerwiseDraft(drafter, width, length, top_k)(CONTEXT, TOKEN)
    wanted = beam_search(drafter, CONTEXT, TOKEN, width, length, top_k)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.equal(got.parents, wanted.parents)
    torch.testing.assert_close(got.scores, wanted.scores)


@SETTINGS
@pytest.mark.parametrize("rule", ["best", "beams"])
def test_both_forms_draft_the_same_trees(drafter, width, length, top_k, rule):
    """The operator, and the layers with a beam step a depth."""
    compiled = make_draft(bound_drafter(), width, length, top_k)
    assert isinstance(compiled, CompiledDraft) and compiled.compiled
    layerwise = LayerwiseDraft(drafter, width, length, top_k)
    mine, theirs = (
        build_tree(draft(CONTEXT, TOKEN), rule, width * length, fixed_size=True)
        for draft in (compiled, layerwise)
    )
    for name in ("tokens", "parents", "depths", "num_nodes"):
        assert torch.equal(getattr(mine[0], name), getattr(theirs[0], name)), name
    assert torch.equal(mine[1], theirs[1])


def test_where_the_operator_cannot_be_used_the_layers_are(monkeypatch):
    """By what the operator says: no library, no kernels for the device, another dtype."""
    made = bound_drafter()
    for name, value in {"compiled_available": lambda: False, "has_kernel": lambda _: False}.items():
        with monkeypatch.context() as patch:
            patch.setattr(draft_op, name, value)
            draft = make_draft(made, 4, 3, 0)
        assert isinstance(draft, LayerwiseDraft)
    wide = bound_drafter().double()
    wide.embedding = EMBEDDING.double()
    assert isinstance(make_draft(wide, 4, 3, 0), LayerwiseDraft)
    # The drafter that a fallback was made for kept its weights.
    wanted = make_draft(bound_drafter(), 4, 3, 0)(CONTEXT, TOKEN)
    assert torch.equal(draft(CONTEXT, TOKEN).tokens, wanted.tokens)


@pytest.mark.parametrize("with_lookup", [True, False])
@pytest.mark.parametrize("form", [make_draft, LayerwiseDraft])
def test_a_captured_draft_takes_nothing_from_the_host(monkeypatch, form, with_lookup):
    there = torch.device("meta")
    for name in ("beam_step", "build_tree", "draft", "candidates", "suffix_lookup"):
        module = importlib.import_module(f"vllm_redrafter.ops.{name}")
        monkeypatch.setattr(module, "has_kernel", bool)
    drafter = tiny_drafter().to(there)
    drafter.embedding = EMBEDDING.to(there)
    draft = form(drafter, 4, 3, 5)
    assert isinstance(draft, LayerwiseDraft if form is LayerwiseDraft else CompiledDraft)
    buffers = DraftBuffers(4, 12, HIDDEN, torch.float32, there)
    text = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=torch.zeros(4, 64, dtype=torch.int32, device=there)),
        total_len=SimpleNamespace(gpu=torch.zeros(4, dtype=torch.int32, device=there)),
    )
    lookup = TextLookup(text, 12)

    def trees(context, known, slots, counts):
        beams = draft(context, known)
        if with_lookup:
            return hybrid_trees(beams, lookup(slots), 12, counts)
        return *build_tree(beams, "best", 12, fixed_size=True), buffers.tokens[:3]

    with HostTensors() as seen:
        buffers.run(trees, 3)
    assert seen.found == [] and seen.calls > 5


def test_a_prompt_of_embeddings_is_not_looked_up():
    """Its placeholders are: only what the request said after them counts."""
    text = torch.tensor([[0, 0, 0, 0, 5, 6, 7, 5], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    states = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=text),
        total_len=SimpleNamespace(gpu=torch.tensor([8, 5], dtype=torch.int32)),
    )
    lookup, slots = TextLookup(states, 2), torch.arange(2)
    assert lookup(slots).matched.gt(0).any(1).tolist() == [True, True]
    lookup.starts = torch.tensor([4, 4], dtype=torch.int32)
    found = lookup(slots)
    assert found.matched.gt(0).any(1).tolist() == [True, False]
    assert found.tokens[0, 0].tolist() == [6, 7]


@pytest.mark.parametrize("rule", ["best", "beams"])
@pytest.mark.parametrize("compiled", [True, False])
def test_trees_of_fixed_size(drafter, monkeypatch, rule, compiled):
    """The same trees, padded with rows that see themselves alone."""
    beams = LayerwiseDraft(drafter, 4, 3, 0)(torch.randn(2, HIDDEN), torch.tensor([1, 7]))
    if not compiled:
        module = importlib.import_module("vllm_redrafter.ops.build_tree")
        monkeypatch.setattr(module, "has_kernel", lambda device: False)
    loose, loose_masks = build_tree(beams, rule, 12)
    tree, masks = build_tree(beams, rule, 12, fixed_size=True)
    used = loose.max_nodes
    assert tree.max_nodes == 13 and masks.shape == (2, 13, 1)
    assert torch.equal(tree.tokens[:, :used], loose.tokens)
    assert torch.equal(tree.parents[:, :used], loose.parents)
    assert torch.equal(tree.depths[:, :used], loose.depths)
    assert torch.equal(masks[:, :used], loose_masks)
    assert torch.equal(masks[:, used:, 0], (1 << torch.arange(used, 13)).expand(2, -1))
    assert (tree.parents[:, used:] == -1).all() and (tree.depths[:, used:] == 0).all()


def branching():
    """Nodes 1 - 2 are the best chain, 3 hangs on the root, 4 on node 1; row 5 is padding."""
    tree = Tree.from_lists([[9, 1, 2, 3, 4]] * 2, [[-1, 0, 1, 0, 1]] * 2)
    pad = torch.nn.functional.pad
    padded = Tree(
        pad(tree.tokens, (0, 1)), pad(tree.parents, (0, 1), value=-1), pad(tree.depths, (0, 1)),
        tree.num_nodes,
    )  # fmt: skip
    return padded, torch.cat([tree.packed_mask(), torch.full((2, 1, 1), 1 << 5)], 1)


def test_a_store_keeps_trees_chains_and_nothing():
    store = TreeStore(4, 5, 5, CPU)
    store.reset(0, Shape.TREE)
    store.reset(3, Shape.CHAIN)
    tree, masks = branching()
    drafted = Drafted(tree, masks, torch.tensor([[9, 1, 2, 3, 1, 9]] * 2))
    tokens = store.put(torch.tensor([0, 3]), drafted, torch.tensor([True, True]))
    assert tokens.tolist() == [[1, 2, 3, 4, 0], [1, 2, 0, 0, 0]]
    assert store.num_nodes.tolist() == [5, 1, 1, 3]
    assert store.parents[0].tolist() == [-1, 0, 1, 0, 1, -1]
    assert store.parents[3].tolist() == [-1, 0, 1, -1, -1, -1]
    assert store.depths[3].tolist() == [0, 1, 2, 0, 0, 0]
    assert store.sources[0].tolist() == [0, 1, 2, 3, 1, 0]
    assert store.sources[3].tolist() == [0, 1, 2, 0, 0, 0]
    alone = pack_bits(torch.eye(6, dtype=torch.bool))
    assert torch.equal(store.masks[3, 3:], alone[3:])
    assert torch.equal(store.masks[0], masks[0])

    store.reset(0, Shape.NOTHING)
    assert store.num_nodes[0] == 1 and torch.equal(store.masks[0], alone)
    tokens = store.put(torch.tensor([0, 3]), drafted, torch.tensor([True, False]))
    assert tokens.tolist() == [[0] * 5] * 2
    assert store.num_nodes.tolist() == [1, 1, 1, 1]


def test_a_store_forgets_what_no_step_will_verify():
    store = TreeStore(4, 5, 5, CPU)
    tree, masks = branching()
    drafted, both = Drafted(tree, masks, torch.ones_like(tree.tokens)), torch.tensor([0, 3])
    store.put(both, drafted, torch.tensor([True, True]))
    kept = {name: value[0].clone() for name, value in vars(store).items() if name in NAMES}
    assert store.clear(torch.tensor([3])).tolist() == [[0] * 5]
    fresh = TreeStore(4, 5, 5, CPU)
    for name in NAMES:
        assert torch.equal(getattr(store, name)[0], kept[name]), name
        assert torch.equal(getattr(store, name)[3], getattr(fresh, name)[3]), name


def test_counters():
    stats = DeviceStats(4, CPU)
    drafted, accepted = torch.tensor([True, True, False]), torch.tensor([2, 0, 0])
    stats.observe(drafted, torch.tensor([5, 3, 1]), accepted)
    stats.observe_step()
    stats.observe_moves(torch.tensor([[True, False], [True, True]]))
    summary = stats.summary()
    assert summary["drafts"] == 2 and summary["steps"] == 1 and summary["moves"] == 3
    assert summary["nodes_per_draft"] == 3 and summary["acceptance_length"] == 2
    assert summary["accepted_by_depth"] == [0.5, 0.5]
    stats.observe_replaced(drafted)
    stats.host.fall_back("penalties (chain)")
    counters = [value for value in vars(stats).values() if isinstance(value, torch.Tensor)]
    before = [counter.data_ptr() for counter in counters]
    stats.reset()
    assert stats.summary() == DeviceStats(4, CPU).summary()
    # Where CUDA graphs add to them.
    assert [counter.data_ptr() for counter in counters] == before
    assert all(not counter.any() for counter in counters)


def test_a_worker_sleeps_at_level_1_alone():
    class Stock:
        def sleep(self, level=1):
            self.level = level

    class Worker(TreeWorkerMixin, Stock):
        pass

    worker = Worker()
    worker.sleep()
    with pytest.raises(UnsupportedError, match="sleep level 2; use level 1"):
        worker.sleep(2)
    assert worker.level == 1


@pytest.mark.parametrize(
    "request_fields, params, shape, reason",
    [
        ({}, {}, Shape.TREE, ""),
        ({"lora_request": object()}, {}, Shape.TREE, ""),
        ({"prompt_embeds": object()}, {}, Shape.TREE, ""),
        ({}, {"repetition_penalty": 1.1}, Shape.CHAIN, "penalties"),
        ({}, {"presence_penalty": 0.1}, Shape.CHAIN, "penalties"),
        ({}, {"frequency_penalty": 0.1}, Shape.CHAIN, "penalties"),
        ({}, {"bad_words": ["x"]}, Shape.CHAIN, "bad words"),
        ({}, {"structured_outputs": "json"}, Shape.CHAIN, "structured output"),
        ({}, {"thinking_token_budget": 5}, Shape.NOTHING, "a thinking"),
        ({}, {"repetition_detection": object()}, Shape.NOTHING, "repetition detection"),
        ({}, {"stop_token_ids": list(range(128))}, Shape.TREE, ""),
        ({}, {"stop_token_ids": list(range(129))}, Shape.NOTHING, "more than 128 stop tokens"),
    ],
)
def test_what_a_request_may_have(request_fields, params, shape, reason):
    plain = {
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "bad_words": None, "structured_outputs": None, "thinking_token_budget": None,
        "repetition_detection": None, "stop_token_ids": [3, 4], "eos_token_id": 5,
    }  # fmt: skip
    fields = {"lora_request": None, "prompt_embeds": None, **request_fields}
    request = SimpleNamespace(sampling_params=SimpleNamespace(**(plain | params)), **fields)
    got, why = shape_of_request(request)
    assert got is shape and why.startswith(reason) and bool(why) == bool(reason)
