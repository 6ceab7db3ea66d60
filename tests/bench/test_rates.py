# SPDX-License-Identifier: Apache-2.0
"""Request rates through servers: the client's clock, the figures and the table."""

import asyncio
import json

import pytest
from aiohttp import ClientSession, web

from vllm_redrafter.bench import rates as serve
from vllm_redrafter.bench.engine_process import SpecCounters
from vllm_redrafter.bench.engines import Settings
from vllm_redrafter.bench.markdown import markdown
from vllm_redrafter.bench.server import ServerCounters, flags, read_counters


def events(tokens):
    """What `vllm serve` streams for a completion."""
    for token in range(tokens):
        yield {"choices": [{"text": str(token)}], "usage": None}
    yield {"choices": [], "usage": {"completion_tokens": tokens}}


async def completions(request):
    body = await request.json()
    response = web.StreamResponse()
    await response.prepare(request)
    for event in events(len(body["prompt"])):
        await asyncio.sleep(0.02)
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


async def ask_a_server(prompts, rate):
    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    what = serve.Rates("t", {}, [], Settings(max_tokens=9), [rate])
    try:
        async with ClientSession() as session:
            return await serve.arrivals(session, f"http://127.0.0.1:{port}", prompts, rate, what)
    finally:
        await runner.cleanup()


def test_answers_of_a_server():
    prompts = [[1] * 3, [2] * 7, [3] * 5]
    answers = asyncio.run(ask_a_server(prompts, rate=20.0))
    assert [answer.tokens for answer in answers] == [3, 7, 5]
    # Sent one after the other, and a token every 20 ms or a little later.
    assert 0 <= answers[0].sent < answers[1].sent < answers[2].sent
    for answer in answers:
        assert answer.sent < answer.first < answer.last
        assert 0.015 < answer.per_token < 0.2


def test_figures_and_table():
    fast = [serve.Answer(0.0, 0.1, 1.1, 11), serve.Answer(1.0, 1.2, 3.2, 21)]
    slow = [serve.Answer(0.0, 0.1, 2.1, 11), serve.Answer(1.0, 1.2, 5.2, 21)]
    plain, ours = serve.figures(slow), serve.figures(fast)
    assert ours["tokens"] == 32 and ours["tokens_per_second"] == pytest.approx(10.0)
    assert ours["tpot_p50_ms"] == pytest.approx(100) and plain["tpot_p95_ms"] == pytest.approx(200)
    assert ours["ttft_p95_ms"] == pytest.approx(195)
    row = serve.compare_rate({"plain": [plain, plain], "redrafter": [ours, plain]})
    ratio = row["servers"]["redrafter"]["ratios"]["tokens_per_second"]
    assert (ratio["low"], ratio["high"]) == pytest.approx((1.0, 10 / (32 / 5.2)))
    report = {
        "target": "t", "set": "s", "sampling": ", greedy", "results": [],
        "arguments": {"dtype": "d", "max_tokens": 1}, "machine": {"cpu": "c", "threads": 2,
        "vllm": "1"}, "labels": {"plain": "plain vLLM", "redrafter": "ReDrafter"},
        "rates": [{"rate": 0.5, "set": "s", "rounds": 2, **row, "other_load": 0.4}],
    }  # fmt: skip
    lines = markdown(report).splitlines()
    assert [line[:27] for line in lines if "| 0.5 |" in line][0] == "| 0.5 | plain vLLM | 2 | 6."
    assert "(1.31; 1.00 to 1.63)" in [line for line in lines if "| 0.5 | ReDrafter" in line][0]
    assert "other programs used 0.4 cores" in lines[-1]


def test_what_a_server_counted():
    counted = ServerCounters(SpecCounters(4, 20, 6, (4, 2)), {"drafter": 3, "lookup": 3, "both": 0})
    found = serve.figures([serve.Answer(0, 1, 2, 10)], counted, joules=5.0)
    assert (found["acceptance_length"], found["nodes_per_draft"]) == (2.5, 5.0)
    assert found["accepted_at_depth"] == [1.0, 0.5] and found["joules_per_token"] == 0.5
    assert found["accepted_by_source"] == {"drafter": 0.5, "lookup": 0.5, "both": 0.0}
    plain = serve.figures([serve.Answer(0, 1, 2, 10)], ServerCounters())
    assert plain["acceptance_length"] is None and plain["joules_per_token"] is None
    both = serve.compare_rate({"plain": [plain, plain], "redrafter": [found, plain]})
    assert both["servers"]["redrafter"]["acceptance_length"] == 2.5


def test_counters_of_the_metrics_page():
    text = """
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0"} 3.0
vllm:spec_decode_num_drafts_total{engine="1"} 1.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e9
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} 20.0
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 6.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 2.0
# TYPE redrafter_accepted_tokens_by_source counter
redrafter_accepted_tokens_by_source_total{engine="0",source="lookup"} 5.0
"""
    now = read_counters(text)
    assert now == ServerCounters(SpecCounters(4, 20, 6, (4, 2)), {"lookup": 5})
    assert now - now == ServerCounters(SpecCounters(0, 0, 0, (0, 0)), {"lookup": 0})
    assert read_counters("") == ServerCounters()


def test_flags_of_an_engine():
    given = {"enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 3,
             "speculative_config": {"method": "x"}, "revision": None}  # fmt: skip
    assert flags(given) == ["--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "3",
                            "--speculative-config", '{"method": "x"}']  # fmt: skip


def test_requests_at_a_rate():
    what = serve.Rates("t", {"plain": None, "x": {}}, [], Settings(rounds=3), [0.5, 4, 16],
                       seconds=20)  # fmt: skip
    assert [what.count(rate) for rate in what.rates] == [16, 80, 128]
    assert what.expected_seconds() == pytest.approx((32 + 20 + 8) * 6)
