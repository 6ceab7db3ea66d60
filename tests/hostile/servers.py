# SPDX-License-Identifier: Apache-2.0
"""Both servers, the crowd between them, and what they hold when it has gone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
from serving.server import Server, plain_and_redrafter

from hostile.crowd import Report, crowd
from hostile.load import LONGEST
from hostile.ties import is_tie

TESTS = Path(__file__).resolve().parents[1]
FAULTY_PERCENT = 1
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", str(LONGEST),
    # Scarce blocks, so that requests are preempted. A prompt is never taken in parts: plain vLLM's
    # CPU engine cannot do that for seeded ones.
    "--max-num-seqs", "16", "--max-num-batched-tokens", "16384",
    "--num-gpu-blocks-override", "40", "--block-size", "32",
    "--served-model-name", "target",
)  # fmt: skip
FAULTY = ("--worker-extension-cls", "hostile.faulty.FaultyDrafting")


@dataclass(frozen=True)
class Outcome:
    """A run: what the crowd saw and what was left in ReDrafter's server.

    Attributes:
        stats: of the worker, when the last request had ended.
        ties: differences that are of rounding; they are no longer among the report's.
        left: requests that vLLM still counts, by state, and whether blocks are still in use.
        exit_codes: of plain vLLM and ours at SIGTERM.
        orphans: processes that outlived the server.
    """

    report: Report
    stats: dict[str, Any]
    ties: int
    left: dict[str, Any]
    preemptions: float
    exit_codes: tuple[int, int]
    orphans: int


@contextmanager
def both_servers(directory: Path) -> Iterator[tuple[Server, Server]]:
    """Plain vLLM, and ReDrafter whose drafting fails now and then, on a tiny target."""
    target = tiny_models.write_llama(directory / "target", context_weight=0.8)
    drafter = tiny_models.write_fitted_drafter(directory / "drafter", target)
    paths = [str(TESTS), os.environ.get("PYTHONPATH")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "VLLM_SERVER_DEV_MODE": "1"}
    with plain_and_redrafter(directory, target, drafter, FLAGS, env, FAULTY) as both:
        yield both


def worker(server: Server, method: str, *args: str) -> Any:
    """What the only worker answers."""
    (result,) = server.post("/collective_rpc", {"method": method, "args": list(args)})["results"]
    return result


def left_over(server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """The worker's counters and what is still there, once a last request has swept up."""
    deadline = time.monotonic() + 30
    while True:
        server.post("/v1/completions", {"model": "target", "prompt": [1, 2], "max_tokens": 3})
        stats, metrics = worker(server, "redrafter_stats"), server.metrics()
        left = {
            "running": metrics["vllm:num_requests_running"],
            "waiting": metrics["vllm:num_requests_waiting"],
            "remembered requests": stats["remembered_requests"],
            "remembered trees": stats["remembered_trees"],
            "cache usage": metrics["vllm:kv_cache_usage_perc"],
        }
        if not any(left.values()) or time.monotonic() > deadline:
            return stats, left
        time.sleep(0.5)


def run(directory: Path, seconds: float, seed: int = 0) -> Outcome:
    """The crowd for that long."""
    with both_servers(directory) as (plain, ours):
        worker(ours, "inject_faults", str(FAULTY_PERCENT))
        report = asyncio.run(crowd((plain, ours), seconds, seed))
        stats, left = left_over(ours)
        preemptions = ours.metrics()["vllm:num_preemptions_total"]
        codes = plain.stop(), ours.stop()
        orphans = len(ours.orphans())
    found = report.differences
    report.differences = [one for one in found if not is_tie(directory / "target", *one)]
    ties = len(found) - len(report.differences)
    return Outcome(report, stats, ties, left, preemptions, codes, orphans)
