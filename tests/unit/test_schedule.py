# SPDX-License-Identifier: Apache-2.0
"""Nodes by batch size: the rates that a schedule maximises, and what the data sheets say."""

import logging
from types import SimpleNamespace

import pytest

from vllm_redrafter.budget.schedule import (
    A100,
    PROFILE,
    Roofline,
    computed_schedule,
    device_named,
    expected_tokens,
    gains,
    schedule,
)
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.engine import node_schedule
from vllm_redrafter.engine.node_schedule import (
    bits_of,
    drafter_cost,
    read_config,
    target_cost,
    with_schedule,
)
from vllm_redrafter.options import ReDrafterOptions

H100 = device_named("NVIDIA H100 80GB HBM3")
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
DRAFTER = DrafterConfig(
    vocab_size=128256, hidden_size=4096, exit_dim=8192, num_draft_layers=2, rnn=True,
    draft_vocab_size=32000,
)  # fmt: skip


def nodes_at(ranges, batch):
    return next(nodes for first, last, nodes in ranges if first <= batch <= last)


def test_the_profile_is_met_and_bends():
    for nodes, tokens in PROFILE:
        assert expected_tokens(nodes) == pytest.approx(tokens)
    found = gains(40)
    assert len(found) == 40 and min(found) > 0 and found == sorted(found, reverse=True)
    assert 1 + sum(found[:7]) == pytest.approx(2.68)
    assert gains(0) == []


def free(batch):
    return 0.0


def test_free_rows_take_all_nodes_and_dear_ones_none():
    assert schedule(lambda rows: 1.0, free, gains(15), 9) == ((1, 9, 15),)
    assert schedule(float, free, gains(15), 9) == ((1, 9, 0),)
    assert schedule(lambda rows: 1.0, lambda batch: 9.0, gains(15), 9) == ((1, 9, 0),)


@pytest.mark.parametrize("levels", [None, (0, 3, 7)])
@pytest.mark.parametrize("draft_cost", [0.0, 0.3, 1.5])
def test_every_entry_is_the_best_of_what_is_left(levels, draft_cost):
    def cost(rows):
        return max(20.0, 0.9 * rows) + 0.05 * rows

    def draft(batch):
        return draft_cost * (4 + batch)

    chances = [0.5, 0.4, 0.2, 0.2, 0.1, 0.05, 0.04]
    ranges = schedule(cost, draft, chances, 40, levels=levels)
    limit = len(chances)
    for batch in range(1, 41):
        rates = {
            nodes: batch * (1 + sum(chances[:nodes]))
            / (cost(batch * (1 + nodes)) + (draft(batch) if nodes else 0))
            for nodes in (levels or range(limit + 1)) if nodes <= limit
        }  # fmt: skip
        found = nodes_at(ranges, batch)
        assert rates[found] == pytest.approx(max(rates.values()), rel=1e-12)
        limit = found
    assert [r[0] for r in ranges] == [1, *(r[1] + 1 for r in ranges[:-1])] and ranges[-1][1] == 40
    nodes = [r[2] for r in ranges]
    assert nodes == sorted(set(nodes), reverse=True) and len(nodes) > 1


def test_the_nodes_of_a_large_batch_do_not_come_back():
    """Where a step has room again; the lower number stays."""
    room = {4: 1.0, 6: 9.0, 8: 1.0}
    ranges = schedule(lambda rows: room.get(rows, 1.0), free, [0.9], 4)
    assert ranges == ((1, 2, 1), (3, 4, 0))


def test_a_step_that_drafts_has_no_more_rows_than_asked():
    ranges = schedule(lambda rows: 1.0, free, gains(15), 100, most_rows=64)
    assert all(b * (1 + nodes_at(ranges, b)) <= 64 for b in range(1, 65))
    assert nodes_at(ranges, 4) == 15 and nodes_at(ranges, 65) == 0


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA Unheard Of"])
@pytest.mark.parametrize("nodes", [2, 15, 31])
def test_never_where_a_step_is_bound_by_its_arithmetic(name, nodes):
    device = device_named(name)
    target = target_cost(LLAMA_8B, device, 1)
    ranges = computed_schedule(target, drafter_cost(DRAFTER, device), 4, 3, nodes, 600)
    assert ranges[0][2] == nodes and ranges[-1][1:] == (600, 0)
    for first, last, drafted in ranges:
        assert drafted == 0 or target(last * (1 + drafted)) == target(first)
    assert len(ranges) <= 9


def test_a_dear_drafter_ends_sooner():
    target, cheap = target_cost(LLAMA_8B, H100, 1), drafter_cost(DRAFTER, H100)
    dear = Roofline(20 * cheap.parameters, 20 * cheap.weight_bytes, H100)
    assert nodes_at(computed_schedule(target, cheap, 4, 3, 15, 99), 60) > 0
    assert nodes_at(computed_schedule(target, dear, 4, 3, 15, 99), 60) == 0


def test_devices():
    assert H100.bandwidth == 3.35e12 and device_named("NVIDIA H200").bandwidth == 4.8e12
    assert device_named("NVIDIA GeForce RTX 4090").flops == 165e12
    assert device_named("whatever") is A100


def test_a_targets_size():
    target = target_cost(LLAMA_8B, H100, 1)
    assert target.parameters == pytest.approx(7.5e9, rel=0.01)
    assert target.weight_bytes == 2 * target.parameters and target.most_rows == 295
    half = target_cost({"text_config": LLAMA_8B}, H100, 2)
    assert half.parameters == target.parameters / 2 and half.most_rows == 295
    assert target_cost(LLAMA_8B | {"num_local_experts": 8}, H100, 1) is None
    assert target_cost({"n_embd": 768}, H100, 1) is None


@pytest.mark.parametrize(
    "config, bits",
    [
        ({}, 16),
        ({"quantization_config": {"quant_method": "fp8"}}, 8),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, 8),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, 4),
    ],
)
def test_bits(config, bits):
    assert bits_of(config) == bits


# -- in the engine's arguments ---------------------------------------------------------------------


def args(**changes):
    given = {"model": "m", "hf_config_path": None, "revision": None, "tensor_parallel_size": 1,
             "data_parallel_size": 1, "max_num_seqs": 64}  # fmt: skip
    return SimpleNamespace(**given | changes)


OPTIONS = ReDrafterOptions(model="d", num_speculative_tokens=15)


@pytest.fixture
def on_a_gpu(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(node_schedule, "read_config", lambda engine_args: LLAMA_8B)


def test_filled_in_on_a_gpu(on_a_gpu):
    found = with_schedule(args(), OPTIONS, DRAFTER).num_speculative_tokens_per_batch_size
    assert found[0] == (1, 18, 15) and found[-1][1] == 64
    free = with_schedule(args(max_num_seqs=None), OPTIONS, DRAFTER)
    assert free.num_speculative_tokens_per_batch_size[-1] == (148, 1024, 0)


def test_not_on_a_cpu():
    assert with_schedule(args(), OPTIONS, DRAFTER) is OPTIONS


@pytest.mark.parametrize(
    "options, changes",
    [
        ({"node_budget": "fixed"}, {}),
        ({"num_speculative_tokens_per_batch_size": ((1, 8, 3),)}, {}),
        ({}, {"data_parallel_size": 2}),
    ],
)
def test_left_alone(on_a_gpu, options, changes):
    given = ReDrafterOptions(model="d", num_speculative_tokens=15, **options)
    assert with_schedule(args(**changes), given, DRAFTER) is given


def test_a_target_of_unknown_size_is_said(on_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(node_schedule, "read_config", lambda engine_args: {})
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("WARNING", logger="vllm"):
        assert with_schedule(args(), OPTIONS, DRAFTER) is OPTIONS
    assert "cannot tell the target's size" in caplog.text


def test_the_config_that_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 12}')
    assert read_config(args(model=str(tmp_path)))["hidden_size"] == 12
    assert read_config(args(model=str(tmp_path / "none"))) == {}
