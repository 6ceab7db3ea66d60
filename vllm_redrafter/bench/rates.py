# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM and others behind `vllm serve`, at several request rates.

All servers are alive together and take turns; those whose turn it is not have nothing to do.
Requests arrive at random (exponential times between them, a fixed seed), the same requests at the
same times for all. Figures as `vllm bench serve` defines them: tokens/s are all tokens over the
time from the first request to the last answer; time per output token (TPOT) is (last token - first
token) / (tokens - 1), of every request; time to first token (TTFT) begins when it is sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp

from vllm_redrafter.bench.energy import joules_between
from vllm_redrafter.bench.energy import read_counters as read_energy
from vllm_redrafter.bench.engine_process import EngineFailed, machine_cpu_seconds
from vllm_redrafter.bench.engines import Settings
from vllm_redrafter.bench.own_counters import shares
from vllm_redrafter.bench.server import MODEL, Server, ServerCounters
from vllm_redrafter.bench.variants import PLAIN

WARM_UP = 4  # requests, one after the other, before anything is timed
RATIOS = ("tokens_per_second", "tpot_p50_ms", "tpot_p95_ms", "ttft_p50_ms", "ttft_p95_ms")


@dataclass(frozen=True)
class Rates:
    """What is to be measured.

    Attributes:
        target, settings, max_num_seqs: as of `engines.engine_arguments`.
        variants: speculative_config of every server; plain vLLM is among them.
        prompts: token ids; used again where they are too few.
        rates: requests a second.
        seconds: of arrivals at each rate.
        least, most: requests at each rate, whatever the seconds say.
        seed: of the arrivals.
    """

    target: str
    variants: Mapping[str, dict[str, Any] | None]
    prompts: Sequence[list[int]]
    settings: Settings
    rates: Sequence[float]
    seconds: float = 20.0
    least: int = 16
    most: int = 128
    max_num_seqs: int = 64
    seed: int = 0

    def count(self, rate: float) -> int:
        """Requests at one rate."""
        return max(self.least, min(self.most, round(rate * self.seconds)))

    def expected_seconds(self) -> float:
        """Of all arrivals, all servers and rounds."""
        once = sum(self.count(rate) / rate for rate in self.rates)
        return once * self.settings.rounds * len(self.variants)


@dataclass(frozen=True)
class Answer:
    """One request: seconds from the run's start, and tokens."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Seconds."""
        return (self.last - self.first) / max(1, self.tokens - 1)


def measure_rates(
    what: Rates, end: float | None, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The figures of one rate after the other, as plain values.

    Args:
        end: no rate starts after this ``time.monotonic()``, but the first one.
        report: called with what runs.

    Raises:
        EngineFailed: a server did not start, or did not answer.
    """
    servers: dict[str, Server] = {}
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory(prefix="redrafter-bench-") as logs:
        session = runner.run(_client())
        try:
            runner.run(_start(what, servers, Path(logs), session, report))
            for number, rate in enumerate(what.rates):
                if number and end is not None and time.monotonic() > end:
                    return
                yield runner.run(_one_rate(what, rate, servers, session, report))
        except aiohttp.ClientError as error:
            raise EngineFailed(f"a server did not answer: {error}") from error
        finally:
            runner.run(session.close())
            for server in servers.values():
                server.stop()


async def _client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=1800), connector=aiohttp.TCPConnector(limit=0)
    )


async def _start(
    what: Rates, servers: dict[str, Server], logs: Path, session: aiohttp.ClientSession,
    report: Callable[[str], None],
) -> None:  # fmt: skip
    """Start one server after the other, because ReDrafter times the machine meanwhile; warm them.

    Args:
        servers: gets each one at once, so that it can be stopped whatever happens.
    """
    for name, config in what.variants.items():
        report(f"starting the server of {name}")
        server = servers[name] = Server(
            logs / f"{len(servers)}.log", what.target, config, what.settings, what.max_num_seqs
        )
        await server.ready(session)
        for prompt in what.prompts[:WARM_UP]:
            await ask(session, server.url, prompt, what.settings, 0.0)


async def _one_rate(
    what: Rates, rate: float, servers: Mapping[str, Server], session: aiohttp.ClientSession,
    report: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    count = what.count(rate)
    asked = [what.prompts[i % len(what.prompts)] for i in range(count)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for number in range(what.settings.rounds):
        # Who is first changes with every round.
        for name in list(servers)[:: 1 if number % 2 == 0 else -1]:
            report(f"{rate:g} requests/s, round {number + 1}: {name}, {count} requests")
            before = await servers[name].counters(session)
            load, energy = _busy(servers), read_energy()
            began = time.monotonic()
            answers = await arrivals(session, servers[name].url, asked, rate, what)
            seconds = time.monotonic() - began
            others = max(0.0, _busy(servers) - load) / seconds
            joules = joules_between(energy, read_energy())
            # ReDrafter's own counters arrive once a second.
            await asyncio.sleep(1.2)
            counted = await servers[name].counters(session) - before
            runs[name].append({**figures(answers, counted, joules), "other_load": others})
    return {"rate": rate, **compare_rate(runs), "runs": runs}


def _busy(servers: Mapping[str, Server]) -> float:
    """Processor seconds of everything but this process and the servers."""
    mine = time.process_time() + sum(server.cpu_seconds() for server in servers.values())
    return machine_cpu_seconds() - mine


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: list[int], settings: Settings, began: float
) -> Answer:
    """One streamed answer.

    Args:
        began: ``time.monotonic()`` of the run's start.
    """
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": settings.max_tokens,
        "temperature": settings.temperature, "ignore_eos": settings.ignore_eos,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent, first, last, tokens = time.monotonic() - began, 0.0, 0.0, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[6:])
            if part.get("choices"):
                last = time.monotonic() - began
                first = first or last
            if part.get("usage"):
                tokens = part["usage"]["completion_tokens"]
    return Answer(sent, first, last, tokens)


async def arrivals(
    session: aiohttp.ClientSession, url: str, prompts: Sequence[list[int]], rate: float,
    what: Rates,
) -> list[Answer]:  # fmt: skip
    """All prompts, arriving at ``rate`` a second; the order of arrival is that of the prompts."""
    source, at, due = random.Random(what.seed), 0.0, []
    for _ in prompts:
        due.append(at)
        at += source.expovariate(rate)
    began = time.monotonic()

    async def one(prompt: list[int], when: float) -> Answer:
        await asyncio.sleep(max(0.0, began + when - time.monotonic()))
        return await ask(session, url, prompt, what.settings, began)

    return await asyncio.gather(*map(one, prompts, due))


def figures(
    answers: Sequence[Answer], counted: ServerCounters | None = None, joules: float | None = None
) -> dict[str, Any]:
    """Of one run.

    Args:
        counted: what the server counted in it.
        joules: energy of the run.
    """
    per_token = [answer.per_token for answer in answers if answer.tokens > 1] or [0.0]
    first = [answer.first - answer.sent for answer in answers]
    seconds = max(answer.last for answer in answers) - min(answer.sent for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    spec = (counted or ServerCounters()).spec
    return {
        "requests": len(answers),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tpot_p50_ms": 1e3 * median(per_token),
        "tpot_p95_ms": 1e3 * _p95(per_token),
        "ttft_p50_ms": 1e3 * median(first),
        "ttft_p95_ms": 1e3 * _p95(first),
        "acceptance_length": 1 + spec.accepted / spec.drafts if spec.drafts else None,
        "accepted_at_depth": [n / spec.drafts for n in spec.accepted_at] if spec.drafts else [],
        "nodes_per_draft": spec.draft_tokens / spec.drafts if spec.drafts else None,
        "accepted_by_source": shares(counted.accepted_by_source) if counted else {},
        "joules_per_token": None if joules is None or not tokens else joules / tokens,
    }


def compare_rate(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians of the rounds by server, and the ratios of its rounds to the plain ones beside them.

    Returns:
        "servers", and "other_load", the mean of cores that other programs used.
    """
    out: dict[str, Any] = {}
    for name, rounds in runs.items():
        out[name] = {key: _middle([run[key] for run in rounds]) for key in rounds[0]}
        if name != PLAIN:
            pairs = list(zip(rounds, runs[PLAIN], strict=True))
            out[name]["ratios"] = {
                key: _ratios([ours[key] / plain[key] for ours, plain in pairs])
                for key in RATIOS
                if all(plain[key] for _, plain in pairs)
            }
    loads = [run.get("other_load", 0.0) for rounds in runs.values() for run in rounds]
    return {"servers": out, "other_load": sum(loads) / len(loads)}


def _middle(values: Sequence[Any]) -> Any:
    """The median of numbers, item by item of lists; of shares the mean, which adds up to 1."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], list):
        return [median(column) for column in zip(*known, strict=False)]
    if isinstance(known[0], dict):
        names = dict.fromkeys(name for one in known for name in one)
        return {name: sum(one.get(name, 0.0) for one in known) / len(known) for name in names}
    return median(known)


def _ratios(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
