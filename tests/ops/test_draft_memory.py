# SPDX-License-Identifier: Apache-2.0
"""The formula of a draft's memory is what the CUDA code allocates, emulated on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from draft_cases import make_drafter, make_inputs
from emulation.build import load
from torch.profiler import ProfilerActivity, profile

from vllm_redrafter.drafter.beam_search import Beams
from vllm_redrafter.engine.v2.hybrid import TextLookup, hybrid_trees
from vllm_redrafter.engine.v2.memory import _trees_bytes, draft_bytes
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.draft import plain_layers
from vllm_redrafter.options import ReDrafterOptions


def peak_bytes(call):
    """The most that torch's allocator gave out at one time, above what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_measurement():
    def call():
        for _ in range(2):
            torch.empty(1000)
        kept = torch.empty(100)
        return kept.clone()

    assert peak_bytes(call) == 4000


@pytest.mark.parametrize(
    "batch, width, length, nodes, top_k, settings",
    [
        (3, 4, 3, 7, 0, {}),
        (2, 6, 2, 12, 9, {"blocks": 0}),
        (4, 3, 1, 3, 0, {"exit_dim": 32}),
        (2, 5, 4, 15, 0, {"rnn": False, "blocks": 0, "draft_vocab": 1500}),
    ],
)
def test_a_draft(batch, width, length, nodes, top_k, settings):
    shapes = {"vocab": 3000, "hidden": 16, "exit_dim": 24, "blocks": 2, "rnn": True}
    # float32: for others torch's matrix product has scratch memory of its own on a CPU.
    drafter = make_drafter(**shapes | settings)
    config = drafter.config
    context, token = make_inputs(drafter, batch, 0)
    layers = plain_layers(drafter)
    operators = load("draft")

    def call():
        shape = (batch, length, width)
        beams = Beams(
            root=token,
            tokens=torch.empty(shape, dtype=torch.int64),
            parents=torch.empty(shape, dtype=torch.int64),
            scores=torch.empty(shape),
        )
        operators.draft(
            beams.tokens, beams.parents, beams.scores, context, token, drafter.embedding,
            drafter.draft_vocab, layers, config.draft_vocab_size, config.exit_dim,
            config.num_draft_layers, bool(config.rnn), top_k,
        )  # fmt: skip
        return build_tree(beams, "best", nodes, fixed_size=True)

    options = ReDrafterOptions(
        model="m", num_speculative_tokens=nodes, beam_width=width, draft_length=length,
        top_k=top_k, prompt_lookup=False,
    )  # fmt: skip
    formula = draft_bytes(options, config, batch, 4)
    measured = peak_bytes(call)
    assert measured <= formula <= measured * 1.02, (measured, formula)


@pytest.mark.parametrize("batch, nodes, followed", [(3, 15, 16), (2, 70, 5)])
def test_trees_of_both_sources(batch, nodes, followed):
    """Of the formula what is made of the beams, where the drafter takes nothing."""
    beams = Beams(
        root=torch.ones(batch, dtype=torch.int64),
        tokens=torch.arange(4).repeat(batch, 3, 1),
        parents=torch.zeros(batch, 3, 4, dtype=torch.int64),
        scores=torch.arange(-1.0, -13.0, -1.0).view(3, 4).repeat(batch, 1, 1),
    )
    text = torch.randint(4, (batch, 50), dtype=torch.int32)
    lengths = torch.full((batch,), 50, dtype=torch.int32)
    states = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=text), total_len=SimpleNamespace(gpu=lengths)
    )
    lookup, slots = TextLookup(states, min(followed, nodes)), torch.arange(batch)

    def call():
        counts = torch.full_like(slots, nodes)
        return hybrid_trees(beams, lookup(slots), nodes, counts)

    options = ReDrafterOptions(
        model="m", num_speculative_tokens=nodes, prompt_lookup_num_tokens=followed
    )
    formula, measured = _trees_bytes(options, batch), peak_bytes(call)
    assert measured <= formula <= measured * 1.15, (measured, formula)
