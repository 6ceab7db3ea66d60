# SPDX-License-Identifier: Apache-2.0
"""What a step and a draft cost on the loaded model, measured once when an engine starts.

A few passes of the target without requests, and a few drafts: ``SECONDS`` in all, or two sizes of
each where these take longer. Then kept in a file for the next start of the same model on the same
machine, and corrected by running steps (``vllm_redrafter.budget.model``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_redrafter import __version__
from vllm_redrafter.budget.costs import (
    NO_DRAFT,
    CostTable,
    CostTableError,
    DraftShape,
    convex,
    read_table,
)
from vllm_redrafter.cache import cache_path
from vllm_redrafter.engine.compat import vllm_version
from vllm_redrafter.engine.first_rank import first_ranks_object, several_ranks
from vllm_redrafter.engine.tree_step import TreeStep
from vllm_redrafter.engine.v1.request_tree import chain_masks
from vllm_redrafter.ops.library import isa
from vllm_redrafter.options import ReDrafterOptions

logger = logging.getLogger("vllm.vllm_redrafter")

SECONDS = 2.0
REPEATS = 5
# In the order of their worth: what is cut off by the time limit is what matters least.
ROWS = (1, 8, 32, 64, 2, 16, 4, 128)
BATCHES = (1, 8, 32)
ATTENTION_ROWS, ATTENTION_CONTEXT = 8, 1024


def cost_table(runner: Any, options: ReDrafterOptions, shapes: list[DraftShape]) -> CostTable:
    """The table of the option, of an earlier start, or measured now.

    Args:
        runner: a Model Runner V1 whose model and KV cache are loaded, ours.
        options: with ``cost_table``.
        shapes: the drafts that may be made.
    """
    identity = identity_of(runner, options)
    kept = _kept_at(identity)
    table = _found(options, identity, kept)
    if several_ranks():
        # Files may differ between hosts, but measuring takes all ranks or none.
        table = first_ranks_object(table)
    if table is None:
        table = measure(runner, shapes, identity)
        _keep(table, kept)
    return table


def _found(
    options: ReDrafterOptions, identity: dict[str, str], kept: Path
) -> CostTable | None:
    """The table of the option or of an earlier start; None where it is not this engine's."""
    if options.cost_table:
        try:
            return read_table(Path(options.cost_table).expanduser(), identity)
        except CostTableError as error:
            logger.warning(
                "The cost table %s is not used: %s. Costs are measured now; `vllm-redrafter "
                "calibrate` writes a new one.", options.cost_table, error,
            )  # fmt: skip
    elif kept.is_file():
        try:
            return read_table(kept, identity)
        except CostTableError as error:
            logger.warning("The kept cost table %s is measured again: %s.", kept, error)
    return None


def identity_of(runner: Any, options: ReDrafterOptions) -> dict[str, str]:
    """What a table belongs to."""
    config = runner.vllm_config
    return {
        "machine": _machine(),
        "threads": str(torch.get_num_threads()),
        "isa": isa(),
        "target": str(config.model_config.model),
        "dtype": str(config.model_config.dtype),
        "mode": str(config.compilation_config.mode),
        "ranks": str(config.parallel_config.tensor_parallel_size),
        "drafter": options.model,
        "draft": f"{options.beam_width},{options.draft_length}",
        "versions": f"vllm {vllm_version()}, torch {torch.__version__}, {__version__}",
    }


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} x {os.cpu_count()}"


def _kept_at(identity: dict[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return cache_path() / "costs" / f"{name}.json"


def _keep(table: CostTable, path: Path) -> None:
    """For the next start; a cache that cannot be written is no reason to fail."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        logger.info("The cost table cannot be kept (%s); it is measured at every start.", error)


@torch.inference_mode()
def measure(runner: Any, shapes: list[DraftShape], identity: dict[str, str]) -> CostTable:
    """Time the target and the drafter; see the module."""
    start = time.perf_counter()
    # All ranks of a target have to make the same passes, however long these take.
    limit = math.inf if several_ranks() else SECONDS
    most = min(runner.max_num_tokens, runner.max_num_reqs * (1 + runner.num_spec_tokens))
    sizes = [rows for rows in ROWS if rows <= max(most, 1)]
    rows = _measured(sizes, lambda count: _target_pass(runner, count), start, 0.7 * limit)
    drafts = {}
    batches = [batch for batch in BATCHES if batch <= runner.max_num_reqs]
    for shape in shapes:
        if shape != NO_DRAFT:
            draft = _draft_of(runner, shape)
            drafts[shape] = _measured(batches, draft, start, 0.95 * limit)
    table = CostTable(identity, rows, drafts, _attention_seconds(runner))
    logger.info(
        "ReDrafter measured in %.1f s: %s", time.perf_counter() - start, describe(table)
    )
    return table


def _measured(
    sizes: list[int], run: Callable[[int], None], start: float, until: float
) -> tuple[tuple[float, float], ...]:
    """The shortest time of each size; two sizes whatever the time is, or rows have no cost.

    Rounds over all sizes, so that a while in which another program runs spoils no size alone.
    """
    run(sizes[0])  # the first call allocates
    began, shortest = time.perf_counter() - start, {}
    for number in range(REPEATS):
        # Half of the time for the first round: what has one try alone may be anything.
        end = until if number else (began + until) / 2
        for size in list(shortest) if number else sizes:
            before = time.perf_counter()
            if len(shortest) > 1 and before - start > end:
                break
            run(size)
            took = time.perf_counter() - before
            shortest[size] = min(took, shortest.get(size, took))
    return convex(sorted((float(size), seconds) for size, seconds in shortest.items()))


def _target_pass(runner: Any, rows: int) -> None:
    """All of a step but attention and scheduling."""
    hidden, _ = runner._dummy_run(rows)
    logits = runner.model.compute_logits(hidden[:rows])
    if logits is not None:
        logits.float().argmax(-1)


def _draft_of(runner: Any, shape: DraftShape) -> Callable[[int], None]:
    config = runner.vllm_config.model_config
    most = torch.zeros(max(BATCHES), config.get_hidden_size(), dtype=config.dtype)
    return lambda batch: runner.drafter.draft(most[:batch], [0] * batch, shape) and None


def _attention_seconds(runner: Any) -> float:
    """Seconds per row and token of context, over all layers."""
    layers = runner.attend_to_nothing(ATTENTION_ROWS, ATTENTION_CONTEXT)
    before = time.perf_counter()
    layers = runner.attend_to_nothing(ATTENTION_ROWS, ATTENTION_CONTEXT)
    seconds = time.perf_counter() - before
    return layers * seconds / (ATTENTION_ROWS * ATTENTION_CONTEXT)


def attend_to_nothing(layer: Any, rows: int, context: int) -> None:
    """Tree attention of a chain of ``rows`` over ``context`` tokens of whatever the cache holds.

    Args:
        layer: one of vLLM's whose attention is ours.
    """
    impl = layer.impl
    key_cache, _ = impl.split_cache(layer.kv_cache)
    blocks, block_size = key_cache.shape[0], key_cache.shape[2]
    context = min(context, blocks * block_size - rows)
    shape = rows, impl.num_heads, impl.head_size
    query = torch.ones(shape, dtype=key_cache.dtype)
    one = torch.zeros(1, dtype=torch.int32)
    step = TreeStep(
        request_index=one,
        row_start=one,
        row_count=one + rows,
        context_lens=one + context,
        masks=torch.from_numpy(chain_masks(rows)),
        covers_all=True,
    )
    table = torch.arange(blocks, dtype=torch.int32)[None]
    impl.attend_trees(step, query, torch.empty_like(query), layer.kv_cache, table)


def describe(table: CostTable) -> str:
    """In one line, milliseconds."""
    steps = ", ".join(f"{rows:g} rows {1e3 * seconds:.1f}" for rows, seconds in table.rows)
    drafts = "; ".join(
        f"W={width} L={length} "
        + ", ".join(f"batch {batch:g} {1e3 * seconds:.2f}" for batch, seconds in points)
        for (width, length), points in table.drafts.items()
    )
    return f"target {steps} ms; draft {drafts or 'none'} ms"
