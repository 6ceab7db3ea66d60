# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in a process of its own, and a client made of the standard library."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 420
STOP_SECONDS = 90


class Server:
    """One server on a free port; ``start`` returns at once, ``wait`` when it answers."""

    def __init__(
        self,
        log: Path,
        model: Path,
        *flags: str,
        speculative: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = (str(Path(sys.executable).with_name("vllm")), "serve"),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        command = [*program, str(model), *flags, *address]
        if speculative is not None:
            command += ["--speculative-config", json.dumps(speculative)]
        env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
        # The output goes to a file: a full pipe would stop the server.
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.children: list[psutil.Process] = []

    def wait(self) -> None:
        """Return when the server is healthy; raise with its log if it is not going to be."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self._url("/health"), timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        """SIGTERM, as a supervisor sends it; returns the exit code."""
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_SECONDS)

    def orphans(self) -> list[psutil.Process]:
        """Processes of this server that still run after it has ended."""
        _, alive = psutil.wait_procs(self.children, timeout=10)
        return [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """End whatever is left of this server's own session."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(timeout=30)

    def resident_bytes(self) -> int:
        """Of the server and its children; what they share is counted for each."""
        server = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (server, *server.children(recursive=True)))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._open(path, body) as answer:
            return json.load(answer)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of one answer."""
        with self._open(path, {**body, "stream": True}) as answer:
            for line in answer:
                event = line.decode().strip().removeprefix("data: ")
                if event == "[DONE]":
                    return
                if event:
                    yield json.loads(event)
        raise RuntimeError("the stream ended without [DONE]")

    def samples(self) -> list[Any]:
        """Prometheus samples: name, labels, value."""
        with urllib.request.urlopen(self._url("/metrics"), timeout=30) as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples]

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by name, summed over their labels."""
        found: dict[str, float] = {}
        for sample in self.samples():
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url(path),
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            return urllib.request.urlopen(request, timeout=300)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()}") from error

    def _url(self, path: str) -> str:
        return f"{self.url}{path}"


@contextmanager
def plain_and_redrafter(
    directory: Path,
    target: Path,
    drafter: Path,
    flags: tuple[str, ...],
    env: dict[str, str] | None = None,
    more: tuple[str, ...] = (),
) -> Iterator[tuple[Server, Server]]:
    """A plain server and one with ReDrafter, started side by side; ``more`` are flags of ours."""
    plain = Server(directory / "plain.log", target, *flags, env=env)
    ours = Server(
        directory / "redrafter.log", target, *flags, *more, env=env,
        speculative={"method": "redrafter", "model": str(drafter)},
    )  # fmt: skip
    try:
        plain.wait()
        ours.wait()
        yield plain, ours
    finally:
        plain.kill()
        ours.kill()
