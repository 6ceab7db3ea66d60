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
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.engine_process import Generation, SpecCounters
from vllm_redrafter.bench.engines import Engines, Settings, default_threads, openmp_environment
from vllm_redrafter.bench.machine import describe_machine
from vllm_redrafter.bench.own_counters import added, budget_facts, shares
from vllm_redrafter.training.repeats import is_looping

Progress = Callable[[int, int, str], None]

# Cores used by other programs above which times mean little. An idle Linux uses about 0.02.
BUSY_CORES = 0.15


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values.

    Attributes:
        median, low, high: the median, the first and the third quartile.
    """

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread | None:
    """The spread of any values; None of none."""
    if not values:
        return None
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Spread(statistics.median(values), low, high)


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
        nodes_by_source, accepted_by_source: shares of the verified and of the accepted nodes by
            who drafted them; {} where that is not counted.
        draft_shapes: shares of the drafts by the drafter's "W,L", "0,0" where it did not run.
        budget: what the node budget expected and what came (`bench.own_counters`).
        first_ms: milliseconds from a request's arrival to its first token, waiting included.
        per_token_ms: milliseconds from one token of a request to the next, in the mean of the
            request.
        joules_per_token: energy of the processor packages, the whole machine's; None where the
            platform does not tell it.
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
    nodes_by_source: dict[str, float] = field(default_factory=dict)
    accepted_by_source: dict[str, float] = field(default_factory=dict)
    draft_shapes: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)
    first_ms: Spread | None = None
    per_token_ms: Spread | None = None
    joules_per_token: float | None = None


@dataclass(frozen=True)
class Requests:
    """Figures of single requests of one variant, whatever ran beside them.

    Attributes:
        requests: how many, all rounds together.
        first_ms, per_token_ms: as of `Summary`.
        speed_up: the baseline's milliseconds per token over the variant's, over the pairs (same
            prompt, same round); None for the baseline.
        acceptance_length: None where vLLM kept no counters of single requests.
    """

    requests: int
    first_ms: Spread | None
    per_token_ms: Spread | None
    speed_up: Spread | None
    acceptance_length: float | None


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

    def summary(self, variant: str, groups: Collection[int] | None = None) -> Summary:
        """Figures of one variant; see `Summary`.

        Args:
            groups: only these groups of prompts; None: all.
        """
        runs = [run for run in self.of(variant) if groups is None or run.group in groups]
        own = added(run.result.own for run in runs)
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
            nodes_by_source=shares(own.get("nodes_by_source", {})),
            accepted_by_source=shares(own.get("accepted_by_source", {})),
            draft_shapes=shares(own.get("draft_shapes", {})),
            budget=budget_facts(own),
            first_ms=spread_of([1e3 * s for run in runs for s in run.result.first_seconds]),
            per_token_ms=spread_of([ms for run in runs for ms in _per_token_ms(run).values()]),
            joules_per_token=_joules(runs),
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
        spread = spread_of(pairs)
        assert spread is not None, "there are no runs of these groups"
        rounds = sorted({round_ for round_, _ in ours})
        return Ratio(
            overall=_throughput(ours.values()) / _throughput(theirs.values()),
            median=spread.median,
            low=spread.low,
            high=spread.high,
            per_round=tuple(
                _throughput(run for run in ours.values() if run.round == r)
                / _throughput(run for run in theirs.values() if run.round == r)
                for r in rounds
            ),
        )

    def requests(self, variant: str, prompts: Collection[int] | None = None) -> Requests:
        """Figures of the requests of one variant; see `Requests`.

        Args:
            prompts: only these prompts, by index; None: all.
        """
        theirs = {(run.round, run.group): _per_token_ms(run) for run in self.of(self.baseline)}
        first, per_token, ratios = [], [], []
        spec, count, counted = SpecCounters(), 0, True
        for run in self.of(variant):
            base, mine = theirs[run.round, run.group], _per_token_ms(run)
            counted = counted and len(run.result.request_spec) == len(run.prompts)
            for at, prompt in enumerate(run.prompts):
                if prompts is not None and prompt not in prompts:
                    continue
                count += 1
                first += [1e3 * s for s in run.result.first_seconds[at : at + 1]]
                if prompt in mine:
                    per_token.append(mine[prompt])
                if prompt in mine and base.get(prompt):
                    ratios.append(base[prompt] / mine[prompt])
                if counted:
                    spec += run.result.request_spec[at]
        return Requests(
            requests=count,
            first_ms=spread_of(first),
            per_token_ms=spread_of(per_token),
            speed_up=None if variant == self.baseline else spread_of(ratios),
            acceptance_length=1 + spec.accepted / spec.drafts if counted and spec.drafts else None,
        )

    def looping_prompts(self) -> set[int]:
        """Prompts whose answer by the baseline goes in circles (see `training.repeats`)."""
        return {
            prompt
            for run in self.of(self.baseline)
            for prompt, ids in zip(run.prompts, run.result.token_ids, strict=True)
            if is_looping(ids)
        }

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
        # The last round that a prompt was in.
        here = {prompt: ids for (_, prompt), ids in sorted(self.outputs(self.baseline).items())}
        there = {prompt: ids for (_, prompt), ids in _outputs(self.other_batch_runs).items()}
        both = [prompt for prompt in there if prompt in here]  # a deadline may have left some out
        first = [first_difference(there[prompt], here[prompt]) for prompt in both]
        differences = sorted(at for at in first if at is not None)
        return Equality(len(both) - len(differences), len(both), tuple(differences))

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
    engines: Engines | None = None,
    deadline: float | None = None,
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
        engines: running engines of these variants, for which the caller is responsible; None:
            started and stopped here.
        deadline: no group of prompts starts after this `time.monotonic()`, but the first one. A
            group that has started runs on all variants.

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
    largest = max(settings.batch_size, other_batch_size or 1)
    if engines is None:
        started = Engines(target, variants, settings, largest, lambda what: report(0, total, what))
    else:
        started = nullcontext(engines)
    runs: list[Run] = []
    other_runs = []

    def run(name: str, round_: int, g: int, group: tuple[int, ...], **changed: Any) -> Run:
        sampling = sampling_of(settings, group, **changed)
        result = running[name].generate([list(prompts[i]) for i in group], sampling)
        return Run(name, round_, g, group, result)

    with started as running:
        for name in names:
            report(0, total, f"warming up {name}")
            run(name, 0, 0, groups[0], max_tokens=16)
        for round_, g in ((r, g) for r in range(settings.rounds) for g in range(len(groups))):
            if runs and deadline is not None and time.monotonic() > deadline:
                break
            for name in turned(names, round_ + g):
                report(len(runs), total, f"round {round_ + 1}/{settings.rounds}, {name}")
                runs.append(run(name, round_, g, groups[g]))
        # Before the extra runs: a larger batch would raise the baseline's peak alone.
        peaks = running.peak_rss_bytes()
        for g, group in enumerate(other_groups):
            report(len(runs) + g, total, f"{baseline} at batch size {other_batch_size}")
            other_runs.append(run(baseline, 0, g, group))
        report(total, total, "done")
    return Comparison(
        target=str(target),
        variants=dict(variants),
        settings=settings,
        baseline=baseline,
        runs=runs,
        peak_rss_bytes=peaks,
        startup_seconds=running.startup_seconds,
        machine={**describe_machine(), "openmp": openmp_environment()},
        other_batch_size=other_batch_size,
        other_batch_runs=other_runs,
    )


def sampling_of(
    settings: Settings, group: Sequence[int], **changed: Any
) -> dict[str, Any] | list[dict[str, Any]]:
    """Arguments of `SamplingParams` for a group of prompts, or one dict for each of them."""
    common = {
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "ignore_eos": settings.ignore_eos,
        **changed,
    }
    if settings.temperature == 0:
        return common
    return [{**common, "seed": prompt} for prompt in group]


def turned(names: Sequence[str], by: int) -> list[str]:
    """`names` rotated by `by` places: over len(names) turns each one is first once."""
    by %= len(names)
    return [*names[by:], *names[:by]]


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


def _per_token_ms(run: Run) -> dict[int, float]:
    """Milliseconds per output token by prompt; answers of one token have none."""
    times = zip(run.prompts, run.result.later_seconds, run.result.token_ids, strict=False)
    return {
        prompt: 1e3 * seconds / (len(ids) - 1)
        for prompt, seconds, ids in times
        if len(ids) > 1 and seconds > 0
    }


def _joules(runs: Sequence[Run]) -> float | None:
    """Per generated token; None where one run has no figure."""
    used = [run.result.joules for run in runs]
    tokens = sum(run.tokens for run in runs)
    known = [one for one in used if one is not None]
    return sum(known) / tokens if known and len(known) == len(used) and tokens else None


def _added(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return total
