# SPDX-License-Identifier: Apache-2.0
"""Request rates through servers: the client's clock, the figures and the table."""

import argparse
import asyncio
import json

import pytest
from aiohttp import ClientSession, web
from benchmark_scripts import load_script

serve = load_script("serve.py", "serve_script")


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
    args = argparse.Namespace(seed=0, max_tokens=9)
    try:
        async with ClientSession() as session:
            return await serve.run(session, f"http://127.0.0.1:{port}", prompts, rate, args)
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
    assert row["redrafter"]["tokens_per_second_ratios"] == pytest.approx([10 / (32 / 5.2), 1.0])
    report = {
        "target": "t", "arguments": {"set": "s", "dtype": "d", "max_tokens": 1, "rounds": 2},
        "machine": {"cpu": "c", "threads": 2, "vllm": "1"}, "rates": [{"rate": 0.5, **row}],
    }  # fmt: skip
    lines = serve.markdown(report).splitlines()
    assert lines[-2].startswith("| 0.5 | plain vLLM | 2 | 6.2 |")
    assert "(1.31; 1.00 to 1.63)" in lines[-1]


def test_the_same_requests_at_the_same_times():
    args = serve.arguments(["--out", "x"])
    assert args.rates == [0.5, 1, 2, 4, 8, 16] and args.seed == 0 and args.rounds == 2
