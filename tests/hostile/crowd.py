# SPDX-License-Identifier: Apache-2.0
"""The crowd at two servers at once: every request goes to both, and the answers are compared."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from serving.server import Server

from hostile.load import Answer, Request, request

# Nothing that these servers do takes so long, even with 200 before it.
HANGS_AFTER_SECONDS = 180
SAMPLE_SECONDS = 5
BURST_EVERY_SECONDS, BURST = 30, 200
CLIENTS = 12
MOST_DIFFERENCES = 40


@dataclass
class Report:
    """What was seen.

    Attributes:
        kinds: requests by kind.
        statuses: answers of ReDrafter's server by HTTP status.
        compared: answers that were read to the end and held against plain vLLM's.
        tokens: in them.
        differences: (request, plain's answer, ours), the first of them.
        hung: requests that got no answer in HANGS_AFTER_SECONDS.
        memory: per server, (seconds since the start, resident bytes of all its processes).
    """

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    compared: int = 0
    tokens: int = 0
    differences: list[tuple[Request, Answer, Answer]] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    memory: tuple[list[tuple[float, int]], ...] = ((), ())  # type: ignore[assignment]

    def growth(self, server: int, *, since: float = 0.4) -> float:
        """Bytes per second, least squares over the samples behind that share of the time."""
        samples = self.memory[server]
        samples = [s for s in samples if s[0] >= since * samples[-1][0]]
        times, sizes = zip(*samples, strict=True)
        middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
        spread = sum((at - middle) ** 2 for at in times)
        return sum((at - middle) * (size - mean) for at, size in samples) / max(spread, 1e-9)


async def ask(session: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    """One request, as long as the client stays."""
    headers = {"Content-Type": "application/json"}
    post = session.post(f"{url}/v1/completions", data=request.body, headers=headers)
    async with post as response:
        if response.status != 200:
            return Answer(response.status)
        said: dict[int, tuple[list[int], str, Any]] = {}
        parts = 0
        if request.leave_after == 0:
            return Answer(200)
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return Answer(200, error=str(event["error"]))
            for part in event["choices"]:
                tokens, text, reason = said.get(part["index"], ([], "", None))
                said[part["index"]] = (
                    tokens + (part["token_ids"] or []), text + part["text"],
                    part["finish_reason"] or reason,
                )  # fmt: skip
            parts += 1
            if parts == request.leave_after:
                break
        return Answer(200, tuple(said[index] for index in sorted(said)))


async def ask_both(
    session: aiohttp.ClientSession, urls: tuple[str, str], request: Request, report: Report
) -> None:
    """The same request to both; what is exact has to be equal, and so has the status."""
    report.kinds[request.kind] += 1
    try:
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            plain, ours = await asyncio.gather(*(ask(session, url, request) for url in urls))
    except TimeoutError:
        report.hung.append(f"{request.kind}: {request.body[:200]!r}")
        return
    report.statuses[ours.status] += 1
    if request.exact:
        report.compared += bool(ours.choices)
        report.tokens += sum(len(tokens) for tokens, _, _ in ours.choices)
    if plain.status != ours.status or (request.exact and plain != ours):
        if len(report.differences) < MOST_DIFFERENCES:
            report.differences.append((request, plain, ours))


async def crowd(servers: tuple[Server, Server], seconds: float, seed: int = 0) -> Report:
    """Steady clients, and a burst of 200 connections now and then.

    Args:
        servers: plain vLLM's and ours.
    """
    urls = servers[0].url, servers[1].url
    source, report, began = random.Random(seed), Report(memory=([], [])), time.monotonic()
    end = began + seconds
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def client() -> None:
            while time.monotonic() < end:
                await ask_both(session, urls, request(source), report)

        async def bursts() -> None:
            while time.monotonic() + BURST_EVERY_SECONDS < end:
                await asyncio.sleep(BURST_EVERY_SECONDS / 2)
                all_at_once = (ask_both(session, urls, request(source), report)
                               for _ in range(BURST))  # fmt: skip
                await asyncio.gather(*all_at_once)
                await asyncio.sleep(BURST_EVERY_SECONDS / 2)

        async def watch() -> None:
            while time.monotonic() < end:
                for samples, server in zip(report.memory, servers, strict=True):
                    samples.append((time.monotonic() - began, server.resident_bytes()))
                await asyncio.sleep(SAMPLE_SECONDS)

        await asyncio.gather(*(client() for _ in range(CLIENTS)), bursts(), watch())
    return report
