# SPDX-License-Identifier: Apache-2.0
"""Many mixed requests with aborts and preemption: plain vLLM's tokens, and nothing left over."""

import math
import time

import pytest
import workload

from vllm_redrafter.plugin import register


def engine_args(target, **more):
    return {
        "model": str(target), "dtype": "float32", "enforce_eager": True, "max_model_len": 256,
        "block_size": 32, "max_num_seqs": 8, "enable_prefix_caching": True,
        "disable_log_stats": False, **more,
    }  # fmt: skip


def plain_answers(target, mix):
    """The same requests without speculation, aborts or scarcity."""
    return workload.with_engine(
        lambda engine: workload.serve(engine, mix, aborts=False), **engine_args(target)
    )


async def stats_of(engine):
    (stats,) = await engine.collective_rpc("redrafter_stats")
    return stats


async def assert_state_is_seen(engine):
    """While a request runs, what must be gone afterwards is there."""
    long = {"temperature": 0.0, "max_tokens": 240, "ignore_eos": True}
    request = workload.Request(-2, "long", [1, 2, 3], long, 0.0)
    stream = engine.generate(
        {"prompt_token_ids": request.prompt}, workload.sampling_params(request), request.id
    )
    await anext(stream)
    stats = await stats_of(engine)
    assert stats["remembered_requests"] == 1
    assert stats["remembered_trees"] == 1
    assert not await engine.reset_prefix_cache()
    assert len(engine.output_processor.request_states) == 1
    await stream.aclose()


async def soak(engine, mix):
    """Serve the mix; then see what the engine still holds."""
    started = {name: workload.metric(name) for name in COUNTERS}
    answers = await workload.serve(engine, mix, aborts=True)
    await assert_state_is_seen(engine)
    # Gauges and freed blocks are reported with a step's output, so one more request is sent.
    last = workload.Request(-1, "last", [1, 2, 3], {"temperature": 0.0, "max_tokens": 4}, 0.0)
    await workload.ask(engine, last, aborts=False)
    deadline = time.monotonic() + 10
    while (await stats_of(engine))["remembered_requests"] and time.monotonic() < deadline:
        await workload.asyncio.sleep(0.05)
    left = {
        "front end": len(engine.output_processor.request_states),
        "running": workload.metric("vllm:num_requests_running"),
        "waiting": workload.metric("vllm:num_requests_waiting"),
        # vLLM refuses this while any block belongs to a request.
        "blocks in use": not await engine.reset_prefix_cache(),
    }
    counted = {name: workload.metric(name) - started[name] for name in COUNTERS}
    return answers, await stats_of(engine), left, counted


COUNTERS = (
    "vllm:num_preemptions",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_accepted_tokens",
)


def compare(mix, answers, plain):
    """Every answer against plain vLLM's; returns how many were complete."""
    complete = 0
    for request in mix:
        ours, theirs = answers[request.number], plain[request.number]
        where = f"request {request.id}: {request.params}"
        if request.abort_after is not None and ours.finish_reason in (None, "abort"):
            assert ours.tokens == theirs.tokens[: len(ours.tokens)], where
            continue
        complete += 1
        assert ours.tokens == theirs.tokens, where
        assert ours.text == theirs.text, where
        assert ours.finish_reason == theirs.finish_reason, where
        assert len(ours.logprobs) == len(theirs.logprobs), where
        for ours_row, theirs_row in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert ours_row.keys() == theirs_row.keys(), where
            for token, logprob in ours_row.items():
                assert math.isclose(logprob, theirs_row[token], abs_tol=1e-3), where
    return complete


def run_soak(target, drafter, count, blocks):
    register()
    mix = workload.requests(count)
    plain = plain_answers(target, mix)
    speculative = {"method": "redrafter", "model": str(drafter)}
    answers, stats, left, counted = workload.with_engine(
        lambda engine: soak(engine, mix),
        **engine_args(
            target,
            speculative_config=speculative,
            num_gpu_blocks_override=blocks,
            long_prefill_token_threshold=64,
        ),
    )
    complete = compare(mix, answers, plain)
    print(f"{complete} of {count} complete; {stats}; {counted}")
    aborted = sum(request.abort_after is not None for request in mix)
    assert complete >= count - aborted

    assert stats["remembered_trees"] == 0
    assert stats["remembered_requests"] == 0
    assert not any(left.values()), left

    # Otherwise the test would have shown nothing.
    assert counted["vllm:num_preemptions"] > 0
    assert counted["vllm:spec_decode_num_accepted_tokens"] > 0
    assert stats["acceptance_length"] > 1.3
    assert stats["moves"] > 0
    assert stats["fallbacks"]["structured output (chain)"] > 0
    return stats, counted, complete - count + aborted


def test_small_soak(target, drafter):
    run_soak(target, drafter, count=30, blocks=14)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak(target, drafter):
    stats, counted, _ = run_soak(target, drafter, count=300, blocks=20)
    assert counted["vllm:num_preemptions"] >= 10
    assert stats["drafts"] > 2000
