# SPDX-License-Identifier: Apache-2.0
"""With one thing broken the comparison of the other tests fails; and no step reads the device."""

import copy
from types import SimpleNamespace

import pytest
import torch
from engine_cases.cases import LETTERS
from engine_v1.tiny_target import prompts
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from engine_v2.own_process.host_reads import HostReads
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.engine.prometheus import sender
from vllm_redrafter.engine.v2 import model_state
from vllm_redrafter.engine.v2.draft import LayerwiseDraft
from vllm_redrafter.engine.v2.tree_store import Shape
from vllm_redrafter.tree.tree import pack_bits

GREEDY = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture
def broken(pair, monkeypatch):
    def run(**attributes):
        with monkeypatch.context() as patch:
            for name, value in attributes.items():
                patch.setattr(pair.trees.state, name, value)
            return pair.run(prompts(6), GREEDY)

    return run


def test_nothing_broken(broken):
    broken().assert_equal()


def test_mask_off(pair, broken):
    """Every row sees all rows before it, as in a chain."""
    state = pair.trees.state
    rows, slots = pair.trees.most_nodes + 1, state.trees.masks.shape[0]
    causal = pack_bits(torch.ones(rows, rows, dtype=torch.bool).tril())
    chains = SimpleNamespace(masks=causal.repeat(slots, 1, 1), alone=state.trees.alone)
    blind = copy.copy(state.rows)
    blind.trees = chains
    assert not broken(rows=blind).equal


def test_positions_off(broken):
    """A node's position is its slot, not its depth."""
    assert not broken(_depth_shift=lambda batch: 0).equal


def test_kv_move_off(broken):
    assert not broken(movers=[]).equal


def test_seeds_by_slot(pair, monkeypatch):
    """Draws by a node's slot are draws of the same law, but not plain vLLM's."""
    sampler = pair.trees.state.tree_sampler
    original = sampler.sampler.sample
    slots = {}

    def sample(logits, expanded, idx, idx_np, pos, *args, **kwargs):
        return original(logits, expanded, idx, idx_np, slots["pos"], *args, **kwargs)

    honest = type(sampler).__call__

    def call(self, logits, batch, *args):
        slots["pos"] = batch.positions[batch.logits_indices]
        self.sampler.sample = sample
        try:
            return honest(self, logits, batch, *args)
        finally:
            del self.sampler.sample

    monkeypatch.setattr(type(sampler), "__call__", call)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=15) for i in range(4)]
    assert not pair.run(prompts(4), params).equal


@pytest.mark.parametrize(
    "kind",
    [
        # Of those that make what was said likelier: what was drafted beside it then wins.
        {"repetition_penalty": 0.5, "presence_penalty": -2.0},
        # Letters beside each other could also follow each other, but then digits would be due.
        {"structured_outputs": StructuredOutputsParams(regex="([a-p]{2}[0-9]{2}){4}")},
    ],
    ids=["penalties", "a grammar"],
)
def test_trees_for_what_needs_chains(pair, monkeypatch, kind):
    """vLLM takes the rows of a request for consecutive tokens there."""
    params = SamplingParams(temperature=0, max_tokens=16, **kind)
    oracle = {"vocab": LETTERS[:16], "chains": 0, "empty": 0}
    pair.run(prompts(6), params, **oracle).assert_equal()
    monkeypatch.setattr(model_state, "shape_of_request", lambda *_: (Shape.TREE, ""))
    assert not pair.run(prompts(6), params, **oracle).equal


@pytest.mark.parametrize("form", ["compiled", "layer by layer"])
def test_no_step_reads_the_device(hybrid, monkeypatch, form):
    """Not in our methods and not in what they call of ours, with drafter and lookup."""
    if form != "compiled":
        drafter = load_drafter(
            hybrid.speculator.options.model, embedding=hybrid.speculator._draft.embedding
        )
        monkeypatch.setattr(hybrid.speculator, "_draft", LayerwiseDraft(drafter, 6, 4, 0))
    hybrid.reset()
    kinds = [{"temperature": 0}, {"seed": 1}, {"logprobs": 2}, {"presence_penalty": 1.0}]
    params = [SamplingParams(max_tokens=10, **kinds[i % 4]) for i in range(8)]
    # Every step starts a copy of the counters, and brings it along.
    monkeypatch.setattr(sender, "EVERY", 0.0)
    metrics = hybrid.worker._metrics
    metrics._due = 0.0
    with HostReads() as reads:
        hybrid.generate(prompts(8), params)
    stats = hybrid.stats
    assert stats["steps"] > 5
    assert reads.found == []
    # Taken before a step's own work: the last one's is still to come.
    told = metrics._changes._told["redrafter_steps_total", ""]
    assert stats["steps"] - 2 <= told <= stats["steps"]


@pytest.mark.parametrize(
    "code",
    [
        "t.sum().item()", "int(t.sum())", "bool(t.any())", "t.tolist()", "t.numpy()", "t.nonzero()",
        "t[t > 0]", "t.unique()", "torch.repeat_interleave(t, t)", "[0, 1, 2][t[0]]",
        "float(t[0])", "'x' if t[0] else 'y'", "t.masked_select(t > 0)",
    ],
)  # fmt: skip
def test_the_guard_sees_a_read(code):
    from vllm_redrafter.engine import v2

    source = f"def ours(t, torch):\n    return {code}\n"
    scope = {}
    exec(compile(source, str(v2.__path__[0]) + "/made_up.py", "exec"), scope)
    with HostReads() as reads:
        scope["ours"](torch.tensor([1, 2]), torch)
    assert reads.found, code
    with HostReads() as reads:
        eval(f"(lambda t: {code})(torch.tensor([1, 2]))")
    assert not reads.found, "a read outside the package is not ours"
