# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter bench`: everything that was asked for, measured, written and weighed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_redrafter import __version__
from vllm_redrafter.bench import plots
from vllm_redrafter.bench import variants as kinds
from vllm_redrafter.bench.batches import Batches, measure
from vllm_redrafter.bench.compare import Progress
from vllm_redrafter.bench.engines import Settings, context_length, default_threads
from vllm_redrafter.bench.errors import BenchError
from vllm_redrafter.bench.figures import figures
from vllm_redrafter.bench.machine import describe_machine
from vllm_redrafter.bench.markdown import markdown
from vllm_redrafter.bench.models import (
    available_bytes,
    cache_bytes,
    engine_bytes,
    engines_at_once,
    locate_target,
    on_gpu,
)
from vllm_redrafter.bench.progress import Work, in_words, planned
from vllm_redrafter.bench.prompts import RANDOM_TEMPERATURE, PromptSet, load_sets, that_fit
from vllm_redrafter.bench.recommend import recommend
from vllm_redrafter.training.evaluate import parse_settings
from vllm_redrafter.training.files import make_directory, write_atomic, write_json
from vllm_redrafter.training.log import can_plot

# What is shown: what runs, calls that are over, calls in all, the time that is left in words.
Show = Callable[[str, int, int, str], None]

JSON, MARKDOWN = "bench.json", "bench.md"
# The part of the GPU's memory that all engines together may take.
_GPU_SHARE = 0.9


@dataclass(frozen=True)
class BenchOptions:
    """The command's options, by their names there.

    Attributes:
        target: a directory, or a name on the hub.
        drafter: the same; None for the one in this package.
        out: directory of the report.
        prompts: a file, instead of ``sets``.
        sets, count: names of sets of prompts, and prompts of each.
        raw: prompts as plain text, without a chat template.
        variants: what is compared with plain vLLM, by name.
        settings: further fixed trees, "W,L,N".
        also: further variants, speculative_config by name.
        redrafter: further keys of speculative_config for ReDrafter and the fixed trees.
        batch_sizes, queue: as of `batches.Batches`.
        rates: requests a second, through servers of the variants ``servers``.
        rate_seconds: of arrivals at each rate.
        rounds, max_tokens: as of `engines.Settings`.
        minutes: stop after this time, with what there is; None: never.
        dtype: as of `vllm.LLM`.
        compile: torch.compile and CUDA graphs; None: on a GPU.
        engine: further arguments of `vllm.LLM`, for all engines.
        kv_cache_bytes: of every engine; None: room for the largest batch.
        at_once: engines that are alive together; None: as many as fit into memory.
        max_num_seqs: most requests that a server runs together.
    """

    target: str
    out: Path
    drafter: str | None = None
    prompts: Path | None = None
    sets: tuple[str, ...] = ("mt-bench", "humaneval")
    count: int = 8
    raw: bool = False
    variants: tuple[str, ...] = tuple(kinds.default_variants())
    settings: tuple[str, ...] = ()
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    redrafter: dict[str, Any] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    queue: bool = False
    rates: tuple[float, ...] = ()
    servers: tuple[str, ...] = (kinds.REDRAFTER,)
    rate_seconds: float = 20.0
    rounds: int = 3
    max_tokens: int = 128
    minutes: float | None = None
    dtype: str = "bfloat16"
    compile: bool | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    kv_cache_bytes: int | None = None
    at_once: int | None = None
    max_num_seqs: int = 64

    @property
    def drafter_model(self) -> str:
        """What vLLM gets as the drafter."""
        if self.drafter is None:
            return str(kinds.BUNDLED_DRAFTER)
        return str(Path(self.drafter).expanduser()) if self.drafter[:1] == "~" else self.drafter


def bench(options: BenchOptions, show: Show) -> dict[str, Any]:
    """Measure, and write ``bench.json``, ``bench.md`` and, with matplotlib, pictures.

    Files are written after every batch size and every rate: an interruption loses only what was
    not finished.

    Returns:
        what ``bench.json`` holds, and in "recommendation" the flag with the drafter's full path.

    Raises:
        BenchError, FetchError, TrainingError, DrafterError: options, prompts, models or disk do
            not allow it.
        EngineFailed: an engine or server did not start, or died.
    """
    return _Bench(options, show).run()


class _Bench:
    """One run."""

    def __init__(self, options: BenchOptions, show: Show) -> None:
        self.options, self._show, self._starting = options, show, False
        began = time.monotonic()
        self.end = None if options.minutes is None else began + 60 * options.minutes
        self.target = locate_target(options.target)
        _check_drafter(options.drafter_model)
        self.variants = all_variants(options)
        self.servers = chosen_servers(options, self.variants)
        make_directory(options.out)
        loaded = load_sets(options.sets, options.prompts, options.count, self.target, options.raw)
        self.context = self.target.config.get("max_position_embeddings")
        self.sets = [that_fit(one, options.max_tokens, self.context) for one in loaded]
        self.batches = self._batches()
        self.rates = self._rates() if options.rates else None
        self.report = self._report()
        servers = 0 if self.rates is None else len(self.servers)
        self.work = Work(
            planned(self.batches),
            (len(self.variants) + len(self.batches.parts))
            * (len(options.batch_sizes) if options.queue else 1) + servers,
            self.rates.expected_seconds() if self.rates else 0.0, self.end,
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        try:
            self._run_batches()
            if self.rates is not None:
                self._run_rates()
        finally:
            if self.report["results"] or self.report["rates"]:
                self._write(pictures=True)
        if not (self.report["results"] or self.report["rates"]):
            if self.report["remarks"]:
                raise BenchError(f"nothing could be measured; {self.report['remarks'][-1]}")
            raise BenchError("the time was up before anything ran; raise --minutes.")
        return {**self.report, "recommendation": recommend(self.report, self.variants)}

    def _run_batches(self) -> None:
        end = self.end
        if end is not None and self.rates is not None:
            # Requests through servers come last and take as long as they take.
            left = end - time.monotonic()
            end -= min(self.rates.expected_seconds(), left / 2)
        before: dict[tuple[str, int], int] = {}

        def progress(size: int, asked: PromptSet) -> Progress:
            base = before.get((asked.name, size), 0)

            def ran(done: int, total: int, what: str) -> None:
                self._is_up()
                # The last report of a comparison says that all is done, also when time was up.
                if what != "done":
                    self.work.ran(asked.name, size, base + done)
                self._tell(f"{asked.name}, batch size {size}: {what}")

            return ran

        def failed(variant: str, why: str) -> None:
            text = f"{label_of(variant)} was left out, because it does not start: {why}"
            text = " ".join(text.split())[:600]
            if text not in self.report["remarks"]:
                self.report["remarks"].append(text)

        for asked, size, result in measure(self.batches, end, progress, self._start, failed):
            key = (asked.name, size)
            before[key] = before.get(key, 0) + len(result.runs)
            self.work.ran(asked.name, size, before[key])
            one = {**figures(result, asked.categories), "batch_size": size, "set": asked.name}
            self.report["results"].append(one)
            self._write()

    def _run_rates(self) -> None:
        from vllm_redrafter.bench.rates import measure_rates

        assert self.rates is not None
        def report(text: str) -> None:
            self._is_up()
            (self._start if text.startswith("starting") else self._tell)(text)

        for row in measure_rates(self.rates, self.end, report):
            once = self.rates.count(row["rate"]) / row["rate"]
            self.work.served(once * self.options.rounds * len(self.servers))
            row |= {"set": self.sets[0].name, "rounds": self.options.rounds}
            self.report["rates"].append(row)
            self._write()

    def _start(self, text: str) -> None:
        """An engine or a server is being started, and what was started before it is up."""
        self._is_up()
        self.work.begin()
        self._starting = True
        self._tell(text)

    def _is_up(self) -> None:
        if self._starting:
            self.work.started()
        self._starting = False

    def _tell(self, text: str) -> None:
        left = in_words(self.work.seconds_left())
        self._show(text, self.work.done, self.work.total, left)

    def _batches(self) -> Batches:
        options = self.options
        prompts = [ids for one in self.sets for ids in one.token_ids]
        kv = options.kv_cache_bytes or cache_bytes(
            self.target.config, options.dtype, prompts, options.max_tokens, max(options.batch_sizes)
        )
        at_once = options.at_once or engines_at_once(
            engine_bytes(self.target, kv, options.dtype), available_bytes(), len(self.variants) + 1
        )
        settings = self._settings(kv, max(2, at_once))
        return Batches(
            self.target.model, self.variants, self.sets, options.batch_sizes, settings,
            max(2, at_once), options.queue,
        )  # fmt: skip

    def _settings(self, kv_cache_bytes: int, engines: int) -> Settings:
        options = self.options
        prompts = [ids for one in self.sets for ids in one.token_ids]
        compiled = on_gpu() if options.compile is None else options.compile
        shared = {"gpu_memory_utilization": round(_GPU_SHARE / engines, 3)} if on_gpu() else {}
        return Settings(
            dtype=options.dtype,
            max_tokens=options.max_tokens,
            rounds=options.rounds,
            num_threads=default_threads(),
            max_model_len=min(
                context_length(prompts, options.max_tokens), self.context or 1 << 30
            ),
            kv_cache_bytes=kv_cache_bytes,
            enforce_eager=not compiled,
            llm_kwargs={**shared, **options.engine},
            # Counts of single requests tell looping answers apart in a batch.
            request_counters=True,
        )

    def _rates(self) -> Any:
        from vllm_redrafter.bench.rates import Rates

        options, asked = self.options, self.sets[0]
        kv = options.kv_cache_bytes or cache_bytes(
            self.target.config, options.dtype, asked.token_ids, options.max_tokens,
            options.max_num_seqs,
        )  # fmt: skip
        settings = replace(
            self._settings(kv, len(self.servers)),
            temperature=asked.temperature, ignore_eos=asked.ignore_eos,
        )  # fmt: skip
        return Rates(
            self.target.model, self.servers, asked.token_ids, settings, options.rates,
            options.rate_seconds, max_num_seqs=options.max_num_seqs,
        )  # fmt: skip

    def _report(self) -> dict[str, Any]:
        options = self.options
        given = dataclasses.asdict(options)
        for name in ("out", "target"):
            given.pop(name)
        drafter = self._shown_drafter()
        given |= {"drafter": drafter, "prompts": options.prompts and options.prompts.name}
        sampled = [one.name for one in self.sets if one.temperature]
        sampling = ", greedy"
        if sampled:
            sampling = f" at temperature {RANDOM_TEMPERATURE}, a seed for each prompt"
            if len(sampled) < len(self.sets):
                sampling = f", greedy ({', '.join(sampled)}:{sampling})"
        return {
            "version": __version__,
            "target": self.target.name,
            "drafter": Path(drafter).name,
            "set": ", ".join(one.name for one in self.sets),
            "sets": {
                one.name: {"count": len(one.token_ids), "longest": one.longest}
                for one in self.sets
            },
            "sampling": sampling,
            "arguments": given,
            "machine": {**describe_machine(), "threads": default_threads(), "gpu": _gpu()},
            "labels": {name: label_of(name) for name in (kinds.PLAIN, *self.variants)},
            "variants": {kinds.PLAIN: None, **self._shown_variants()},
            "remarks": [text for one in self.sets for text in one.remarks],
            "results": [],
            "rates": [],
            "recommendation": None,
        }

    def _shown_drafter(self) -> str:
        """As the user gave it; where it lies in an installation says nothing to a reader."""
        return self.options.drafter or kinds.BUNDLED_DRAFTER.name

    def _shown_variants(self) -> dict[str, Any]:
        mine = self.options.drafter_model
        return {
            name: {**config, "model": self._shown_drafter()}
            if config.get("model") == mine else config
            for name, config in self.variants.items()
        }  # fmt: skip

    def _write(self, pictures: bool = False) -> None:
        out, report = self.options.out, self.report
        report["recommendation"] = recommend(report, report["variants"])
        drawn: list[str] = []
        if pictures:
            # An older run's picture would be taken for this one's.
            for name in plots.NAMES:
                (out / name).unlink(missing_ok=True)
            drawn = plots.draw(report, out) if can_plot() else []
        write_json(out / JSON, report)
        write_atomic(out / MARKDOWN, markdown(report, drawn).encode())


def all_variants(options: BenchOptions) -> dict[str, dict[str, Any]]:
    """speculative_config of everything that is compared with plain vLLM, by name.

    Raises:
        TrainingError: a setting that is none.
        BenchError: a name that is not known, or given twice; nothing to compare.
    """
    drafter = options.drafter_model
    known = kinds.known_variants(drafter, **options.redrafter)
    unknown = [name for name in options.variants if name not in known]
    if unknown:
        raise BenchError(
            f"--variants has {unknown[0]!r}; give some of {', '.join(known)}, and others with "
            "--also NAME=JSON."
        )
    found = {name: known[name] for name in options.variants}
    for one in parse_settings(options.settings):
        setting = (one.beam_width, one.draft_length, one.num_nodes)
        given = {k: v for k, v in options.redrafter.items() if k != "node_budget"}
        found[str(one)] = kinds.fixed_size(drafter, setting, **given)
    for name, config in options.also.items():
        if name in found or name == kinds.PLAIN:
            raise BenchError(f"--also has {name!r}, which is the name of a variant; give another.")
        found[name] = config
    if not found:
        raise BenchError("there is nothing to compare with plain vLLM; name a variant.")
    return found


def chosen_servers(
    options: BenchOptions, variants: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """speculative_config of every server; plain vLLM's first.

    Raises:
        BenchError: a name that is not among the variants.
    """
    names = [name for name in options.servers if name != kinds.PLAIN]
    unknown = [name for name in names if name not in variants]
    if options.rates and unknown:
        raise BenchError(
            f"--servers has {unknown[0]!r}, which is not measured here; give some of "
            f"{', '.join(variants)}."
        )
    return {kinds.PLAIN: None, **{name: variants[name] for name in names if name in variants}}


def label_of(name: str) -> str:
    """A variant's name for people."""
    if name.count(",") == 2 and name not in kinds.LABELS:
        return f"ReDrafter, always {name}"
    return kinds.LABELS.get(name, name)


def _check_drafter(model: str) -> None:
    """Refuse what is no drafter before anything else runs; downloads one of the hub.

    Raises:
        DrafterError: no drafter.
    """
    from vllm_redrafter.drafter.config import load_config
    from vllm_redrafter.engine.engine_args import locate

    load_config(locate(model))


def _gpu() -> str | None:
    """The GPU's name; None without one."""
    if not on_gpu():
        return None
    import torch

    return torch.cuda.get_device_name(0)
