# SPDX-License-Identifier: Apache-2.0
"""Sliding windows and attention sinks on Model Runner V1: plain vLLM's answers, by trees.

A model's layers fall into several KV cache groups; of those with a window, blocks are freed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_cases.targets import write_drafter
from engine_cases.windows import FAMILIES, WINDOW, write_windowed
from vllm import SamplingParams

from engine_v1.conftest import SPEC
from engine_v1.engines import Engine, Pair, engine, tokens
from engine_v1.tiny_target import prompts
from vllm_redrafter.engine import tree_step
from vllm_redrafter.engine.v1.runner import TreeRunnerMixin

GREEDY = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=200, ignore_eos=True)

# Set in a process that one family has for itself: mixtures of experts need vLLM's groups of ranks
# to be made for them, and they are made once, by the first engine of a process.
ALONE = "REDRAFTER_TEST_ALONE"
EXPERTS = ("gpt_oss",)
# What runs by default; the others are the same code in our hands.
ALWAYS = ("mistral", "gemma2")


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Engines of a family, with contexts of many windows."""
    models: dict[str, Any] = {}

    def make(family: str, **settings: Any) -> Pair:
        if family not in models:
            directory = tmp_path_factory.mktemp("windows") / family
            models[family] = write_windowed(directory, family)
            models["drafter"] = write_drafter(directory.with_name("drafter"))
        settings = {"max_model_len": 512, "enable_prefix_caching": False} | settings
        model, drafter = models[family], models["drafter"]
        return Pair(engine(model, **settings), engine(model, drafter, **settings, **SPEC))

    return make


def long_prompts(count: int, seed: int = 7) -> list[list[int]]:
    return prompts(count, shortest=20, longest=150, seed=seed)


def check_family(pair: Pair) -> None:
    """Batch 1 and 4, greedy and seeded, contexts of up to eight windows."""
    assert any(layer.impl.redrafter_window for layer in layers(pair.trees))
    for batch in (1, 4):
        for params in (GREEDY, SEEDED):
            run = pair.run(long_prompts(batch), params)
            run.assert_equal()
            run.assert_saw_trees(moves=50, accepted=2.0)
            varied = [len(set(said)) for said in tokens(run.expected)]
            assert params is GREEDY or min(varied) > 100, "nearly nothing is said"
    assert not pair.trees.stats["fallbacks"]


def layers(one: Engine) -> list[Any]:
    found = one.runner.compilation_config.static_forward_context.values()
    return [layer for layer in found if hasattr(layer, "impl")]


def groups(one: Engine) -> list[Any]:
    return [group.kv_cache_spec for group in one.runner.kv_cache_config.kv_cache_groups]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow])
        for name in FAMILIES
        if name not in EXPERTS
    ],
)
def test_family(pair_of, family):
    check_family(pair_of(family))


def alone(test: str) -> None:
    """Run a test of this file in a process of its own, where ``ALONE`` is set."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--slow", "-p", "no:cacheprovider",
         f"{__file__}::{test}"],
        env=os.environ | {ALONE: "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_sinks(pair_of, monkeypatch):
    """gpt-oss; the control leaves the sinks out of our rows."""
    if ALONE not in os.environ:
        alone("test_sinks")
        return
    pair = pair_of("gpt_oss")
    check_family(pair)
    for layer in layers(pair.trees):
        assert layer.impl.sinks is not None
    honest = tree_step.tree_attention
    monkeypatch.setattr(tree_step, "tree_attention", lambda *args: honest(*args[:-1], None))
    assert not pair.run(long_prompts(4), GREEDY).equal


def test_groups_and_their_blocks(pair_of):
    """What the tests of this file are about is there: several groups, and freed blocks."""
    assert len(groups(pair_of("mistral").trees)) == 1
    pair = pair_of("gemma2")
    assert len(groups(pair.trees)) == 4
    windows = sorted(layer.impl.redrafter_window for layer in layers(pair.trees))
    assert windows == [0, WINDOW, WINDOW, WINDOW]


def named_blocks(one: Engine) -> Iterator[int]:
    """Numbers of blocks in the runner's tables, those that a window left behind among them."""
    batch, spec = one.runner.input_batch, groups(one)
    for gid, kind in enumerate(spec):
        if getattr(kind, "sliding_window", None):
            yield from batch.block_table[gid].block_table.np[: batch.num_reqs].flatten().tolist()


@pytest.fixture
def littered(pair_of, monkeypatch) -> Iterator[Callable[[str], Pair]]:
    """Before every step all free blocks of our engine, the null block too, are overwritten."""

    def make(family: str) -> Pair:
        pair = pair_of(family)
        runner, pool = pair.trees.runner, pair.trees.scheduler.kv_cache_manager.block_pool
        caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers(pair.trees)}
        pair.trees.stale = 0

        def update(scheduler_output: Any) -> Any:
            free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
            for cache in caches.values():
                cache[[pool.null_block.block_id, *free]] = 500.0
            pair.trees.stale += sum(map(set(free).__contains__, named_blocks(pair.trees)))
            return TreeRunnerMixin._update_states(runner, scheduler_output)

        monkeypatch.setattr(runner, "_update_states", update)
        return pair

    yield make


@pytest.mark.parametrize("family", ALWAYS)
def test_blocks_that_left_a_window_are_not_read(littered, family):
    pair = littered(family)
    run = pair.run(long_prompts(4), GREEDY)
    run.assert_equal()
    assert pair.trees.stale > 100, "no table named a freed block"
    run.assert_saw_trees(moves=50, accepted=2.0)


@pytest.mark.parametrize("family", ALWAYS)
def test_a_stale_block_of_a_window_is_noticed(littered, monkeypatch, family):
    """Negative control: our rows look back a block further, into what was freed."""
    pair = littered(family)
    for layer in layers(pair.trees):
        if layer.impl.redrafter_window:
            monkeypatch.setattr(layer.impl, "redrafter_window", WINDOW + 32)
    assert not pair.run(long_prompts(4), GREEDY).equal


def by_row(honest: Callable[..., None]) -> Callable[..., None]:
    """``tree_attention`` whose windows begin by a row's number in its tree."""

    def attend(out: torch.Tensor, *args: Any) -> None:
        honest(out, *args)
        starts, counts, masks, window = args[7], args[8], args[10], args[13]
        shifts: dict[int, list[int]] = {}
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            for row in range(count):
                depth = sum(int(word).bit_count() for word in masks[start + row].tolist()) - 1
                shifts.setdefault(row - depth, []).append(start + row)
        for shift, rows in shifts.items():
            if window and shift:
                other = out.clone()
                honest(other, *args[:13], max(window - shift, 1), *args[14:])
                out[rows] = other[rows]

    return attend


def test_a_window_by_row_is_noticed(pair_of, monkeypatch):
    pair = pair_of("mistral")
    monkeypatch.setattr(tree_step, "tree_attention", by_row(tree_step.tree_attention))
    run = pair.run(long_prompts(4), GREEDY)
    assert pair.trees.stats["moves"] > 0
    assert not run.equal


def test_moves_in_the_slots_of_another_group_are_noticed(pair_of, monkeypatch):
    pair = pair_of("gemma2")
    runner = pair.trees.runner
    monkeypatch.setattr(runner, "_slots", lambda gid: TreeRunnerMixin._slots(runner, 0))
    assert not pair.run(long_prompts(4), GREEDY).equal


@pytest.mark.slow
@pytest.mark.parametrize("family", ALWAYS)
def test_preempted_chunked_and_cached(pair_of, family):
    """Few blocks, prompts in chunks, and a second round that finds the first one's blocks."""
    blocks = {"mistral": 20, "gemma2": 52}[family]
    pair = pair_of(
        family, num_gpu_blocks_override=blocks, max_num_batched_tokens=64,
        enable_prefix_caching=True, prefix_cache_retention_interval=64,
    )  # fmt: skip
    batch = long_prompts(8)
    first = pair.run(batch, GREEDY)
    first.assert_equal()
    first.assert_saw_trees(moves=50, accepted=1.0)
    assert pair.trees.preemptions > 0
    one = [batch[0]]
    pair.run(one, GREEDY).assert_equal()
    texts = [one[0] + tokens(first.got)[0][:100]]
    again = pair.run(texts, GREEDY, prefixes=False)
    again.assert_equal()
    assert again.got[0].num_cached_tokens > 0


@pytest.mark.slow
def test_one_group_for_all(pair_of):
    """Without vLLM's manager of several groups nothing is freed, and windows hold all the same."""
    pair = pair_of("gemma2", disable_hybrid_kv_cache_manager=True)
    assert len(groups(pair.trees)) == 1
    check_family(pair)


def test_a_window_within_a_tree(tmp_path):
    """Nodes whose root left their window."""
    model = write_windowed(tmp_path / "narrow", "mistral", window=3)
    drafter = write_drafter(tmp_path / "drafter")
    pair = Pair(engine(model), engine(model, drafter, **SPEC))
    run = pair.run(prompts(4), GREEDY)
    run.assert_equal()
    run.assert_saw_trees(moves=50, accepted=2.0)
