# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own, driven over a pipe.

Engines that are compared must not share anything: vLLM's metrics are one registry per process, peak
memory is per process, and thread settings are read once at import. The process blocks in `recv`
between requests, so an idle engine takes no CPU time from the one being timed.

Run as `python -m vllm_redrafter.bench.engine_process FD`, where FD is an inherited pipe.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from vllm_redrafter.bench.energy import joules_between, read_counters
from vllm_redrafter.bench.own_counters import OwnCounters, gained, totals


class EngineFailed(RuntimeError):
    """An engine did not start, or died; the message carries what it said last."""


@dataclass(frozen=True)
class SpecCounters:
    """vLLM's own speculative decoding counters (`vllm:spec_decode_*`).

    `drafts` counts (request, step) pairs that had drafted tokens; `draft_tokens` all their tree
    nodes; `accepted` the accepted ones; `accepted_at[d]` how often at least d+1 were accepted.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()

    def __sub__(self, other: "SpecCounters") -> "SpecCounters":
        before = other.accepted_at + (0,) * (len(self.accepted_at) - len(other.accepted_at))
        return SpecCounters(
            self.drafts - other.drafts,
            self.draft_tokens - other.draft_tokens,
            self.accepted - other.accepted,
            tuple(now - then for now, then in zip(self.accepted_at, before, strict=True)),
        )

    def __add__(self, other: "SpecCounters") -> "SpecCounters":
        depth = max(len(self.accepted_at), len(other.accepted_at))
        mine = self.accepted_at + (0,) * (depth - len(self.accepted_at))
        theirs = other.accepted_at + (0,) * (depth - len(other.accepted_at))
        return SpecCounters(
            self.drafts + other.drafts,
            self.draft_tokens + other.draft_tokens,
            self.accepted + other.accepted,
            tuple(a + b for a, b in zip(mine, theirs, strict=True)),
        )


@dataclass(frozen=True)
class Generation:
    """What one `generate` call gave.

    Attributes:
        token_ids: generated tokens of each prompt.
        texts: the same, decoded.
        seconds: wall time of the whole call: prefill, decode, detokenisation.
        decode_seconds: from the first token of any request to the last token of any request.
        steps: engine steps of the call, prefill included.
        spec: speculative decoding counters of this call alone.
        request_spec: the same for each prompt; [] unless the engine was made with
            `per_request_spec_decode_metrics`, and for plain vLLM.
        finish_reasons: why each answer ended, "stop" or "length".
        part_seconds: wall time inside ReDrafter's code in this call, by part; {} without it.
        fallbacks: drafts not made, or cut to a chain, by reason.
        own: ReDrafter's further counters of this call (`bench.own_counters`); {} without it.
        other_cpu_seconds: processor time of everything else on the machine during the call.
        first_seconds: of each prompt, from its arrival to its first token, waiting included.
        later_seconds: of each prompt, from its first token to its last.
        joules: energy of the processor packages, of the whole machine; None where it is not told.
    """

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    decode_seconds: float
    steps: int
    spec: SpecCounters = field(default_factory=SpecCounters)
    part_seconds: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    other_cpu_seconds: float = 0.0
    request_spec: list[SpecCounters] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    own: OwnCounters = field(default_factory=dict)
    first_seconds: list[float] = field(default_factory=list)
    later_seconds: list[float] = field(default_factory=list)
    joules: float | None = None


class EngineProcess:
    """Handle of a child process that holds one `vllm.LLM`.

    `start()` returns at once; `wait_ready()` blocks until the engine is up, so that several
    engines can load at the same time.

    Args:
        name: for messages.
        llm_kwargs: keyword arguments of `vllm.LLM`.
        env: environment variables for the child, on top of this process's.
    """

    def __init__(self, name: str, llm_kwargs: dict[str, Any], env: dict[str, str]) -> None:
        self.name = name
        self._kwargs = llm_kwargs
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        """Launch the child and hand it the engine's arguments."""
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # without a name: nothing is left behind
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_redrafter.bench.engine_process", str(fd)],
            env={**os.environ, **with_package_path(self._env)},
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Ctrl-C goes to the parent alone, which then stops the children in order.
            start_new_session=True,
        )
        theirs.close()
        self._pipe.send(self._kwargs)

    def wait_ready(self) -> float:
        """Block until the engine accepts requests; returns the child's own start-up seconds."""
        return self._receive()

    def generate(
        self, prompts: list[list[int]], sampling: dict[str, Any] | list[dict[str, Any]]
    ) -> Generation:
        """Run `prompts` (token ids) together, as one batch.

        Args:
            sampling: arguments of `SamplingParams`, for all prompts or one dict for each.
        """
        assert self._pipe is not None, "start() first"
        self._send(("generate", prompts, sampling))
        return self._receive()

    def peak_rss_bytes(self) -> int:
        """Highest resident memory of the engine's process so far."""
        self._send(("peak_rss",))
        return self._receive()

    def stop(self) -> None:
        """End the child; safe to call at any time, also twice."""
        if self._pipe is not None:
            self._pipe.close()  # the child leaves at end of file
            self._pipe = None
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def log_tail(self, lines: int = 25) -> str:
        """The last lines that the child printed."""
        if self._log is None:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        start = max(0, size - (1 << 16))
        # pread: the child writes at the offset that both share.
        text = os.pread(self._log.fileno(), size - start, start).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _send(self, message: tuple[Any, ...]) -> None:
        assert self._pipe is not None, "start() first"
        try:
            self._pipe.send(message)
        except OSError as err:
            raise EngineFailed(f"engine {self.name!r} is gone\n{self.log_tail()}") from err

    def _receive(self) -> Any:
        assert self._pipe is not None and self._process is not None, "start() first"
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError) as err:
            code = self._process.wait()
            raise EngineFailed(
                f"engine {self.name!r} ended with code {code}; its last lines:\n{self.log_tail()}"
            ) from err
        if kind == "error":
            raise EngineFailed(f"engine {self.name!r}: {value}")
        return value


def with_package_path(env: dict[str, str]) -> dict[str, str]:
    """Let the child import this very package, also when it is used without being installed."""
    root = str(Path(__file__).resolve().parents[2])
    before = env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return {**env, "PYTHONPATH": os.pathsep.join(p for p in (root, before) if p)}


def _serve(pipe: Connection) -> None:
    """The child's side: build the engine, then answer until the pipe closes."""
    kwargs = pipe.recv()
    began = time.perf_counter()
    try:
        from vllm import LLM

        engine = LLM(**kwargs)
    except BaseException as err:  # noqa: BLE001 - the parent must hear of every failure
        import traceback

        traceback.print_exc()
        pipe.send(("error", f"{type(err).__name__}: {err}"))
        return
    pipe.send(("ready", time.perf_counter() - began))
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            return
        if command == "generate":
            pipe.send(("done", _generate(engine, *arguments)))
        elif command == "peak_rss":
            import resource

            pipe.send(("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _generate(
    engine: Any, prompts: list[list[int]], sampling: dict[str, Any] | list[dict[str, Any]]
) -> Generation:
    from vllm import SamplingParams

    if isinstance(sampling, dict):
        params = SamplingParams(**sampling)
    else:
        params = [SamplingParams(**one) for one in sampling]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    steps, spec = _counters(engine)
    own = _redrafter_stats(engine)
    others = machine_cpu_seconds() - time.process_time()
    energy = read_counters()
    began = time.perf_counter()
    outputs = engine.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    joules = joules_between(energy, read_counters())
    others = machine_cpu_seconds() - time.process_time() - others
    steps_after, spec_after = _counters(engine)
    own_after = _redrafter_stats(engine)
    stats = [output.metrics for output in outputs]
    return Generation(
        token_ids=[list(output.outputs[0].token_ids) for output in outputs],
        texts=[output.outputs[0].text for output in outputs],
        seconds=seconds,
        decode_seconds=max(s.last_token_ts for s in stats) - min(s.first_token_ts for s in stats),
        steps=steps_after - steps,
        spec=spec_after - spec,
        part_seconds=_gained(own_after, own, "seconds"),
        fallbacks=_gained(own_after, own, "fallbacks"),
        other_cpu_seconds=max(others, 0.0),
        request_spec=_request_counters(outputs),
        finish_reasons=[output.outputs[0].finish_reason for output in outputs],
        own=gained(totals(own_after), totals(own)),
        first_seconds=[s.first_token_latency for s in stats],
        later_seconds=[s.last_token_ts - s.first_token_ts for s in stats],
        joules=joules,
    )


def machine_cpu_seconds() -> float:
    """Busy processor time of the whole machine since it started; 0.0 where it is not known."""
    try:
        fields = Path("/proc/stat").read_text().split(None, 9)
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _redrafter_stats(engine: Any) -> dict[str, Any]:
    """ReDrafter's own counters since start-up; {} for an engine without it."""
    config = engine.llm_engine.vllm_config
    if not (config.additional_config or {}).get("redrafter"):
        return {}
    return engine.collective_rpc("redrafter_stats")[0]


def _gained(after: dict[str, Any], before: dict[str, Any], key: str) -> dict[str, Any]:
    earlier = before.get(key, {})
    gained = {name: value - earlier.get(name, 0) for name, value in after.get(key, {}).items()}
    return {name: value for name, value in gained.items() if value}


def _request_counters(outputs: list[Any]) -> list[SpecCounters]:
    """vLLM's counters of each request; [] where it was not asked to keep any."""
    kept = [output.outputs[0].spec_decode_metrics for output in outputs]
    if any(one is None for one in kept):
        return []
    counters = []
    for one in kept:
        # histogram[j]: steps that accepted j drafted tokens.
        steps = one.histogram
        at_least = [sum(steps[depth:]) for depth in range(len(steps))]
        counters.append(
            SpecCounters(at_least[0], one.num_draft_tokens, sum(at_least[1:]), tuple(at_least[1:]))
        )
    return counters


def _counters(engine: Any) -> tuple[int, SpecCounters]:
    """Engine steps so far and the speculative decoding counters, from vLLM's own metrics."""
    steps, values, accepted_at = 0, {}, ()
    for metric in engine.get_metrics():
        if metric.name == "vllm:iteration_tokens_total":
            steps = metric.count
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted_at = tuple(metric.values)
        elif metric.name.startswith("vllm:spec_decode_num_"):
            values[metric.name.removeprefix("vllm:spec_decode_num_")] = metric.value
    spec = SpecCounters(
        drafts=values.get("drafts", 0),
        draft_tokens=values.get("draft_tokens", 0),
        accepted=values.get("accepted_tokens", 0),
        accepted_at=accepted_at,
    )
    return steps, spec


if __name__ == "__main__":
    # Only this module under its real name may define what travels through the pipe: objects of
    # `__main__` could not be unpickled by the parent.
    from vllm_redrafter.bench.engine_process import _serve as serve

    serve(Connection(int(sys.argv[1])))
