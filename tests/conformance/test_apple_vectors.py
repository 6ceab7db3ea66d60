# SPDX-License-Identifier: Apache-2.0
"""Every vector recorded from Apple's own code, through the public API."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vllm_redrafter as vr

HERE = Path(__file__).parent
CASES = sorted(path.parent.name for path in HERE.glob("*/oracle.npz"))

# Below this score gap a tie or rounding may decide which of two candidates is kept.
CLEAR_MARGIN = 1e-4


@pytest.fixture(params=CASES)
def case(request):
    folder = HERE / request.param
    oracle = dict(np.load(folder / "oracle.npz"))
    oracle = {name: torch.from_numpy(value) for name, value in oracle.items() if value.shape}
    embedding = load_file(folder / "embeddings.safetensors")["weight"]
    drafter = vr.load_drafter(folder, embedding=embedding)
    return drafter, oracle


def draft(drafter, oracle):
    _, width, length = oracle["beams"].shape
    return vr.beam_search(
        drafter,
        oracle["prompt_state"],
        oracle["init_token"],
        beam_width=width,
        draft_length=length - 1,
    )


def test_all_cases_are_here():
    expected = "base flat input_proj length2 no_resblock no_rnn vocab_under_50 width1"
    assert CASES == expected.split()


def test_no_recorded_case_is_decided_by_a_tie(case):
    _, oracle = case
    assert oracle["margin"].min() > CLEAR_MARGIN
    assert oracle["inner_gap"].min() > 0


def test_beam_search(case):
    drafter, oracle = case
    beams = draft(drafter, oracle)
    torch.testing.assert_close(beams.scores.transpose(0, 1), oracle["scores"], rtol=1e-4, atol=1e-4)
    assert torch.equal(beams.sequences(), oracle["beams"])
    assert torch.equal(beams.parents.transpose(0, 1), oracle["parents"])


def test_one_evaluation(case):
    drafter, oracle = case
    raw, states = oracle["raw_logits"], oracle["states"]
    width = raw.shape[2]
    context = oracle["prompt_state"][:, None].expand(-1, width, -1)
    tokens = oracle["init_token"][:, None].expand(-1, width)
    logits, state = drafter(context, tokens, drafter.initial_state(*tokens.shape))
    torch.testing.assert_close(logits, raw[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, states[0], rtol=1e-4, atol=1e-5)


def test_tree(case):
    drafter, oracle = case
    tree = vr.build_tree(draft(drafter, oracle), rule="beams")
    mask = tree.ancestor_mask()
    positions = tree.positions(oracle["past_len"])
    assert torch.equal(tree.num_nodes, oracle["n_nodes"])
    for b, count in enumerate(oracle["n_nodes"].tolist()):
        assert torch.equal(tree.tokens[b, :count], oracle["packed"][b, :count])
        assert torch.equal(tree.depths[b, :count], oracle["position_offset"][b, :count])
        assert torch.equal(positions[b, :count], oracle["position_id"][b, :count])
        assert torch.equal(mask[b, :count, :count], oracle["tree_mask"][b, :count, :count])


def test_greedy_walk(case):
    drafter, oracle = case
    tree = vr.build_tree(draft(drafter, oracle), rule="beams")
    walk = vr.walk_greedy(tree, oracle["node_logits"].argmax(-1)[:, : tree.max_nodes])
    assert torch.equal(walk.num_accepted, oracle["accepted"])
    assert torch.equal(walk.last_node, oracle["accepted_node"])
    assert torch.equal(walk.next_token, oracle["next_token"])


def test_greedy_walk_when_the_target_agrees_with_a_beam(case):
    """The recorded logits are random and accept little; make every beam the target's in turn."""
    drafter, oracle = case
    beams = oracle["beams"]
    tree = vr.build_tree(draft(drafter, oracle), rule="beams")
    for w in range(beams.shape[1]):
        target = torch.full_like(tree.tokens, -7)
        for b in range(beams.shape[0]):
            node = 0
            for token in beams[b, w, 1:].tolist():
                target[b, node] = token
                children = (tree.parents[b] == node) & (tree.tokens[b] == token)
                children[int(tree.num_nodes[b]) :] = False
                node = int(children.nonzero().item())
        walk = vr.walk_greedy(tree, target)
        assert walk.num_accepted.tolist() == [beams.shape[2] - 1] * beams.shape[0]
