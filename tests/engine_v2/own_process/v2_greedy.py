# SPDX-License-Identifier: Apache-2.0
"""Greedy output is plain vLLM's on Model Runner V2, token for token; no tie occurs."""

import types

import pytest
import torch
from engine_v1.engines import answers, tokens
from engine_v1.tiny_target import EOS, prompts
from safetensors.torch import load_file
from vllm import SamplingParams

from engine_v2.own_process.engines import V2Oracle, engine
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.engine.v2.draft import LayerwiseDraft
from vllm_redrafter.ops.build_tree import build_tree

_KEPT = []

GREEDY = SamplingParams(temperature=0, max_tokens=40)


def test_both_engines_run_model_runner_v2(pair):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner

    from vllm_redrafter.engine.v2.model_state import TreeModelState
    from vllm_redrafter.engine.v2.speculator import ReDrafterSpeculator

    for one in (pair.plain, pair.trees):
        assert type(one.runner) is CPUModelRunner
        assert isinstance(one.scheduler, AsyncScheduler)
    assert type(pair.trees.speculator) is ReDrafterSpeculator
    assert type(pair.trees.state) is TreeModelState
    assert pair.plain.speculator is None
    assert type(pair.plain.state) is not TreeModelState


def test_aborted_requests(pair):
    """Clients leave while a step of theirs is in flight; those that wait take their places."""
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    batch = prompts(11, seed=13)
    pair.plain.reset()
    outputs = pair.plain.generate(batch, params)
    expected = tokens(outputs)
    pair.trees.reset(V2Oracle(outputs, 15, range(EOS)))
    serving, said, leaving = pair.trees.llm.llm_engine, {}, ["0", "3", "7"]
    for number, prompt in enumerate(batch):
        serving.add_request(str(number), {"prompt_token_ids": prompt}, params)
    steps = 0
    while serving.has_unfinished_requests():
        for output in serving.step():
            if output.finished:
                said[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 2:
            serving.abort_request(leaving)
    assert said == {i: row for i, row in enumerate(expected) if str(i) not in leaving}
    assert not pair.trees.scheduler.requests
    # Whoever comes next finds nothing of theirs.
    run = pair.run(prompts(4), GREEDY)
    run.assert_equal()
    run.assert_saw_trees(moves=3)


@pytest.mark.slow
def test_bfloat16(make_pair):
    """Rounding depends on the rows of a step, in plain vLLM too, so equality is not claimed."""
    pair = make_pair(dtype="bfloat16")
    run = pair.run(prompts(8), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    run.assert_saw_trees(moves=10)
    said, expected = tokens(run.got), tokens(run.expected)
    assert all(len(row) == 24 for row in said)
    # The first token comes before any draft.
    assert [row[0] for row in said] == [row[0] for row in expected]
    # A wrong mask, position or move would leave few answers alone.
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 4


@pytest.mark.slow
def test_nodes_by_batch_size(target, drafter, pair):
    """vLLM schedules fewer nodes for larger batches: first nodes of the same trees."""
    trees = engine(
        target, drafter, spec_num_speculative_tokens=15, spec_beam_width=4, spec_draft_length=4,
        spec_num_speculative_tokens_per_batch_size=[[1, 2, 15], [3, 8, 4]],
    )  # fmt: skip
    pair.plain.reset()
    expected = pair.plain.generate(prompts(6), GREEDY)
    trees.reset(V2Oracle(expected, 15, range(EOS)))
    assert answers(trees.generate(prompts(6), GREEDY)) == answers(expected)
    assert trees.stats["acceptance_length"] > 1.3


def test_the_recurrent_drafter(pair, taught):
    """No oracle: the drafter, the beams and the tree rule are the real ones."""
    pair.plain.reset()
    taught.reset()
    batch = prompts(8) + prompts(4, seed=8)
    expected = pair.plain.generate(batch, GREEDY)
    assert answers(taught.generate(batch, GREEDY)) == answers(expected)
    stats = taught.stats
    assert stats["acceptance_length"] > 1.5, stats
    assert stats["moves"] > 5, stats
    assert not stats["fallbacks"], stats


def test_the_engine_drafts_with_the_compiled_operator(taught, monkeypatch):
    """And every tree of a run is the one that the drafter's layers give."""
    drafter = load_drafter(
        taught.speculator.options.model, embedding=taught.speculator._draft.embedding
    )
    layerwise = LayerwiseDraft(drafter, 6, 4, 0)
    assert taught.speculator._draft.compiled
    seen = []

    def both(speculator, context, known, batch, nodes):
        drafted = tree, masks, _ = taught.drafts_itself(context, known, batch, nodes)
        other, other_masks = build_tree(layerwise(context, known), "best", 15, fixed_size=True)
        for name in ("tokens", "parents", "depths", "num_nodes"):
            assert torch.equal(getattr(tree, name), getattr(other, name)), name
        assert torch.equal(masks, other_masks)
        seen.append(len(known))
        return drafted

    taught.reset()
    monkeypatch.setattr(
        taught.speculator, "_draft_trees", types.MethodType(both, taught.speculator)
    )
    taught.generate(prompts(4), SamplingParams(temperature=0, max_tokens=12))
    assert len(seen) >= 4 and max(seen) == 4


def test_the_drafter_gets_the_state_that_predicted_the_known_token(pair, target):
    head = load_file(target / "model.safetensors")["lm_head.weight"]
    pair.plain.reset()
    oracle = V2Oracle(pair.plain.generate(prompts(4), GREEDY), 15, range(EOS))
    oracle.contexts = []
    pair.trees.reset(oracle)
    pair.trees.generate(prompts(4), GREEDY)
    known = torch.tensor([token for token, _ in oracle.contexts])
    states = torch.stack([state for _, state in oracle.contexts])
    assert len(known) > 20
    assert torch.equal((states @ head.T).argmax(-1), known)


def test_a_profile_run_leaves_requests_alone(pair):
    """It drafts for requests that are not there."""
    pair.trees.runner.profile_run()
    run = pair.run(prompts(2), GREEDY)
    run.assert_equal()
    run.assert_saw_trees(moves=3)


@pytest.mark.slow
def test_in_processes_of_their_own(pair, target, taught_drafter, monkeypatch):
    """vLLM's default: scheduler, runner and trees, of 67 rows here, are in another process."""
    from vllm import LLM

    params = SamplingParams(temperature=0, max_tokens=24)
    pair.plain.reset()
    expected = pair.plain.generate(prompts(4), params)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # Kept to the end: its destruction tears down process groups that all engines here share.
    _KEPT.append(llm := LLM(
        model=str(target), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
        max_num_batched_tokens=512, block_size=32, num_gpu_blocks_override=64,
        speculative_config={
            "method": "redrafter", "model": str(taught_drafter), "beam_width": 17,
            "draft_length": 4, "num_speculative_tokens": 66,
        },
    ))  # fmt: skip
    requests = [{"prompt_token_ids": prompt} for prompt in prompts(4)]
    got = llm.generate(requests, params, use_tqdm=False)
    stats = llm.collective_rpc("redrafter_stats")[0]
    assert answers(got) == answers(expected)
    assert stats["nodes_per_draft"] > 63, stats
    assert stats["acceptance_length"] > 1.3
