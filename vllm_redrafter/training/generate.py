# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in processes of their own, which answer lists of requests.

Run as ``python -m vllm_redrafter.training.generate FD``, where FD is an inherited pipe. Several
engines side by side are the fastest way to use a CPU with a small target, and the plain way to use
several GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load, save
from torch import Tensor

from vllm_redrafter.training.errors import TrainingError


@dataclass(frozen=True)
class Request:
    """One text to continue."""

    prompt: list[int]
    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the target said; ``ended`` unless ``max_tokens`` cut it off.

    Attributes:
        states: ``[n, H]``, the hidden state from which each token was sampled; None: not kept.
    """

    token_ids: list[int]
    ended: bool
    states: Tensor | None = None


class Engine(Protocol):
    """What makes answers; tests have their own."""

    def generate(self, requests: list[Request], seed: int) -> list[Answer]: ...

    def stop(self) -> None: ...


class EngineProcess:
    """A child process with one ``vllm.LLM``; starts at once, is ready when it first answers."""

    def __init__(
        self, llm_kwargs: dict[str, Any], env: dict[str, str], capture: bool = False
    ) -> None:
        """Start the child.

        Args:
            capture: keep the hidden states of the answers; on Model Runner V1, which gives them.
        """
        if capture:
            env = env | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # without a name: nothing is left behind
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_redrafter.training.generate", str(fd)],
            env={**os.environ, **env, "PYTHONPATH": _python_path()},
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Ctrl-C goes to the parent alone, which then stops the children.
            start_new_session=True,
        )
        theirs.close()
        self._pipe.send((llm_kwargs, capture))

    def generate(self, requests: list[Request], seed: int) -> list[Answer]:
        """Answers in the order of the requests; blocks.

        Raises:
            TrainingError: the engine did not start, refused, or died.
        """
        try:
            self._pipe.send((requests, seed))
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise TrainingError(
                "an engine ended unexpectedly; finished shards are kept. Its last lines:\n"
                + self._tail()
            ) from error
        if kind == "error":
            raise TrainingError(f"vLLM could not run the target: {value}")
        answers, states = value
        if states is None:
            return answers
        parts = load(states)["states"].split([len(answer.token_ids) for answer in answers])
        return [replace(answer, states=part) for answer, part in zip(answers, parts, strict=True)]

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        with contextlib.suppress(OSError):
            self._pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _tail(self, lines: int = 15) -> str:
        size = os.fstat(self._log.fileno()).st_size
        start = max(0, size - (1 << 15))
        # pread: the child writes at the offset that both share.
        text = os.pread(self._log.fileno(), size - start, start).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def start_engines(
    target: str,
    count: int | None,
    *,
    dtype: str,
    max_model_len: int,
    compiled: bool,
    seed: int,
    capture: bool = False,
) -> list[Engine]:
    """Start engines side by side: one per GPU (in turn), or sharing the CPU's cores."""
    gpus = visible_gpus()
    count = count or max(1, len(gpus))
    kwargs = {
        "model": target,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": not compiled,
        "seed": seed,
        "disable_log_stats": True,
    }
    return [EngineProcess(kwargs, engine_env(i, count, gpus), capture) for i in range(count)]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold, one by one; [] without GPUs."""
    import torch

    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named and number:
        return named.split(",")[:number]
    return [str(i) for i in range(number)]


def engine_env(i: int, count: int, gpus: list[str]) -> dict[str, str]:
    """Environment of engine ``i`` of ``count``; what the user has set stays."""
    # In one process with its engine, the child can seed the sampler between two shards.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if gpus:
        return env | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}
    cores = len(os.sched_getaffinity(0))
    defaults = {
        # Engines that bind themselves would all take the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return env | {name: os.environ.get(name, value) for name, value in defaults.items()}


def _python_path() -> str:
    """Let the child import this very package, also when it is used without being installed."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)


def _serve(pipe: Connection) -> None:
    """The child's side: build the engine, then answer until the pipe closes."""
    kwargs, capture = pipe.recv()
    try:
        import torch
        from vllm import LLM, SamplingParams

        engine = LLM(**kwargs)
        states = None
        if capture:
            from vllm_redrafter.engine.v1.capture import StateCapture

            states = StateCapture(engine)
        while True:
            requests, seed = pipe.recv()
            # One seed per shard: seeds per request would need a generator for each of them.
            torch.manual_seed(seed)
            params = [
                SamplingParams(
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    stop_token_ids=list(request.stop_ids) or None,
                    detokenize=False,
                )
                for request in requests
            ]
            inputs = [{"prompt_token_ids": request.prompt} for request in requests]
            outputs = engine.generate(inputs, params, use_tqdm=False)
            answers = [
                Answer(list(one.token_ids), one.finish_reason == "stop")
                for one in (output.outputs[0] for output in outputs)
            ]
            # As bytes: tensors would travel through shared memory, file by file.
            kept = None if states is None else save({"states": states.take(outputs)})
            pipe.send(("done", (answers, kept)))
    except EOFError:
        return
    except BaseException as error:  # noqa: BLE001 - the parent must hear of every failure
        import traceback

        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {error}"))


def end_with_parent(seconds: float = 1.0) -> None:
    """Let this process and its group end soon after its parent, however the parent ended.

    A parent that is killed stops nobody, and an engine looks at its pipe only between two shards,
    minutes apart.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    # Only this module under its real name may define what travels through the pipe: objects of
    # `__main__` could not be unpickled by the parent.
    from vllm_redrafter.training.generate import _serve as serve
    from vllm_redrafter.training.generate import end_with_parent

    end_with_parent()
    serve(Connection(int(sys.argv[1])))
