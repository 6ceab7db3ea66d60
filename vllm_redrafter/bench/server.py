# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in a process of its own, for request rates, and what its `/metrics` counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from vllm_redrafter.bench.engine_process import EngineFailed, SpecCounters, with_package_path
from vllm_redrafter.bench.engines import Settings, engine_arguments

START_SECONDS = 600
STOP_SECONDS = 60
MODEL = "target"

# Of the process of an `LLM`, not of a server.
_NOT_FOR_SERVERS = ("model", "disable_log_stats", "per_request_spec_decode_metrics")
_ONLY_OF_AN_LLM = ("VLLM_ENABLE_V1_MULTIPROCESSING",)


@dataclass(frozen=True)
class ServerCounters:
    """Counters of one server since its start, or what was added in between.

    Attributes:
        spec: vLLM's own.
        accepted_by_source: accepted tokens by who drafted them; {} without ReDrafter.
    """

    spec: SpecCounters = field(default_factory=SpecCounters)
    accepted_by_source: dict[str, float] = field(default_factory=dict)

    def __sub__(self, other: ServerCounters) -> ServerCounters:
        sources = {name: value - other.accepted_by_source.get(name, 0)
                   for name, value in self.accepted_by_source.items()}  # fmt: skip
        return ServerCounters(self.spec - other.spec, sources)


def read_counters(text: str) -> ServerCounters:
    """From the text of `/metrics`; several engines of one server add up."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    at: dict[int, float] = {}
    sources: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name == "vllm:spec_decode_num_accepted_tokens_per_pos":
                position = int(sample.labels["position"])
                at[position] = at.get(position, 0) + sample.value
            elif name == "redrafter_accepted_tokens_by_source":
                source = sample.labels["source"]
                sources[source] = sources.get(source, 0) + sample.value
            elif not sample.name.endswith("_created"):
                totals[name] = totals.get(name, 0) + sample.value
    prefix = "vllm:spec_decode_num_"
    counts = (int(totals.get(prefix + name, 0)) for name in ("drafts", "draft_tokens",
                                                             "accepted_tokens"))  # fmt: skip
    positions = tuple(int(at.get(i, 0)) for i in range(max(at, default=-1) + 1))
    return ServerCounters(SpecCounters(*counts, positions), sources)


def flags(kwargs: Mapping[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as flags of `vllm serve`."""
    found = []
    for name, value in kwargs.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            found += [f"--{flag}", text]
    return found


class Server:
    """One server on a free port, its output in a file.

    Args:
        log: the file.
        target, config, settings, max_num_seqs: as of `engines.engine_arguments`.
    """

    def __init__(
        self,
        log: Path,
        target: str,
        config: dict[str, Any] | None,
        settings: Settings,
        max_num_seqs: int,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        kwargs, env = engine_arguments(target, config, settings, max_num_seqs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_SERVERS}
        env = {name: value for name, value in env.items() if name not in _ONLY_OF_AN_LLM}
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", target, *flags(kwargs),
            "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL,
        ]  # fmt: skip
        with log.open("w") as out:
            try:
                self._process = subprocess.Popen(
                    command, env={**os.environ, **with_package_path(env)}, stdin=subprocess.DEVNULL,
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise EngineFailed(
                    f"`{command[0]}` cannot be started ({error.strerror}); run `vllm-redrafter "
                    "doctor`, or leave out --rates."
                ) from error

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Return when it answers.

        Raises:
            EngineFailed: it ended, or takes too long; the message says what it printed last.
        """
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            try:
                async with session.get(f"{self.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
        raise EngineFailed(f"a server did not start: {self._log.read_text()[-3000:]}")

    async def counters(self, session: aiohttp.ClientSession) -> ServerCounters:
        """Its counters now."""
        async with session.get(f"{self.url}/metrics") as answer:
            return read_counters(await answer.text())

    def cpu_seconds(self) -> float:
        """Processor time of the server's processes so far."""
        used = 0.0
        for one in self._processes():
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                used += times.user + times.system
        return used

    def stop(self) -> None:
        """End it and its children; safe to call when it has ended."""
        children = self._processes()[1:]
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()

    def _processes(self) -> list[psutil.Process]:
        try:
            mine = psutil.Process(self._process.pid)
            return [mine, *mine.children(recursive=True)]
        except psutil.Error:
            return []
