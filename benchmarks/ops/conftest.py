# SPDX-License-Identifier: Apache-2.0
"""Operator benchmarks on the CPU: ours and what it is compared with, taking turns in one run.

    python -m pytest benchmarks/ops [--benchmark-json FILE] [--ops-json FILE] [--ops-rounds N]

Medians and ratios are in pytest-benchmark's ``extra_info`` and in a table at the end; --ops-json
writes that table alone. "cold" calls come after a sweep over other memory that throws everything
out of the caches, as a target's forward pass does; "warm" calls come right after the one before.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vllm_redrafter.ops import compiled_available, isa, why_not

SWEEP_BYTES = 96 << 20  # three times the L3 of the machine this was written on
ROWS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops-json", help="write medians and ratios of the operators there")
    parser.addoption("--ops-rounds", type=int, default=60, help="rounds per benchmark")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # results are published, hostnames are not


def busy_seconds() -> float:
    """CPU time that all programs of the machine have used; 0 where the system does not say."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="session")
def sweep() -> Callable[[], object]:
    # Not zeros: untouched pages of zeros are all the same page, which never leaves the cache.
    return torch.ones(SWEEP_BYTES // 4).sum


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > (os.cpu_count() or 1):
        pytest.skip("not so many cores")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest, sweep) -> Callable[..., dict]:
    """``compare(ours, others, targets, cold, **facts)`` measures and reports.

    Args:
        ours: what pytest-benchmark times.
        others: by name; timed between the rounds of ours, under the same conditions.
        targets: by name of another the most that ours / other may be, or under "ms" the most
            milliseconds of ours. Reported, and never a failure: the machine has neighbours.
        cold: sweep before every call.
        facts: go into the results.
    """
    assert compiled_available(), why_not()

    def run(ours, others, targets, cold, **facts) -> dict:
        times: dict[str, list[float]] = {name: [] for name in (*others, "sweep")}

        def between() -> None:
            for name, other in others.items():
                if cold:
                    times["sweep"].append(seconds(sweep))
                times[name].append(seconds(other))
            if cold:
                sweep()

        for function in (ours, *others.values()):
            function(), function()
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        rounds = request.config.getoption("--ops-rounds")
        benchmark.pedantic(ours, setup=between, rounds=rounds, iterations=1)
        wall = time.perf_counter() - start
        load = max(0.0, busy_seconds() - busy - (time.process_time() - own)) / wall
        if benchmark.stats is None:  # --benchmark-disable
            return {}
        times["ours"] = list(benchmark.stats.stats.data)
        ms = {name: statistics.median(taken) * 1e3 for name, taken in times.items() if taken}
        best = {name: min(taken) * 1e3 for name, taken in times.items() if taken}
        if "sweep" in ms:
            facts["memory_gb_per_s"] = SWEEP_BYTES / ms["sweep"] / 1e6
            if "bytes" in facts:
                floor = facts["bytes"] / facts["memory_gb_per_s"] / 1e6
                facts["over_all_bytes_from_memory"] = ms["ours"] / floor
        row = {
            "name": request.node.name,
            "threads": torch.get_num_threads(),
            "cold": cold,
            **facts,
            "median_ms": ms,
            "best_ms": best,
            "ratio": {name: ms["ours"] / ms[name] for name in others},
            "target": targets,
            "met": {
                name: (ms["ours"] if name == "ms" else ms["ours"] / ms[name]) <= most
                for name, most in targets.items()
            },
            "cores_used_by_others": load,
        }
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        return row

    return run


def rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return value


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = [rounded(row) for row in config.stash[ROWS]]
    if not rows:
        return
    terminalreporter.section(f"operators, {isa()}; medians in ms, and ours / other")
    for row in rows:
        others = "  ".join(f"{k} {row['median_ms'][k]} ({r:.2f}x)" for k, r in row["ratio"].items())
        targets = "  ".join(
            f"target {k} <= {most}: {'met' if row['met'][k] else 'MISSED'}"
            for k, most in row["target"].items()
        )
        terminalreporter.line(
            f"{row['name']:50} {row['median_ms']['ours']:8.4f} "
            f"(best {row['best_ms']['ours']:.4f})  "
            f"{others}  {targets}  [others {row['cores_used_by_others']:.2f} cores]"
        )
    if path := config.getoption("--ops-json"):
        import vllm

        names = [
            line.split(":")[1].split()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        preload = os.environ.get("LD_PRELOAD", "")
        machine = {
            "processor": f"{' '.join(names[0])}, {os.cpu_count()} cores (VM), {isa().upper()}",
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "openmp": "Intel (LD_PRELOAD)" if "iomp" in preload else "GNU",
            "load_average_at_the_end": os.getloadavg()[0],
            "rounds": config.getoption("--ops-rounds"),
        }
        Path(path).write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
