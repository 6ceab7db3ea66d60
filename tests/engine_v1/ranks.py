# SPDX-License-Identifier: Apache-2.0
"""Engines with two tensor-parallel ranks, and what tests do inside their workers.

The functions that take a worker are sent to every rank by ``LLM.collective_rpc``.
"""

from __future__ import annotations

import os
import types
from typing import Any
from unittest import mock

import torch

from engine_v1.oracle import Oracle
from vllm_redrafter.engine import draft_guard
from vllm_redrafter.engine.metrics import ReDrafterStats
from vllm_redrafter.engine.target_tables import target_tables

ENVIRONMENT = {
    # vLLM's default: scheduler and ranks are in processes of their own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # Lets functions be sent there.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # Compiling a mask for the embedding takes each rank 20 s and changes no number.
    "TORCHDYNAMO_DISABLE": "1",
}

# Errors in a row after which drafting ends where faults are put.
FEW = 3


class RankedEngine:
    """One ``LLM`` whose target is divided between two ranks."""

    def __init__(
        self,
        model: Any,
        drafter: Any = None,
        spec: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        from vllm import LLM

        if drafter is not None:
            # Counters are compared: times must not choose.
            fixed = {"model": str(drafter), "node_budget": "fixed"}
            settings["speculative_config"] = fixed | (spec or {})
        with mock.patch.dict(os.environ, ENVIRONMENT):
            self.llm = LLM(
                model=str(model), dtype="float32", enforce_eager=True, max_model_len=256,
                max_num_seqs=8, block_size=32, num_gpu_blocks_override=128, seed=0,
                tensor_parallel_size=2, enable_prefix_caching=False, **settings,
            )  # fmt: skip

    def each_rank(self, function: Any, *args: Any) -> list[Any]:
        """What ``function(worker, *args)``, or the worker's method of that name, returns."""
        # Here too: without it the reader of a reply fails, and the call waits for ever.
        with mock.patch.dict(os.environ, ENVIRONMENT):
            return self.llm.collective_rpc(function, args=args)

    @property
    def stats(self) -> list[dict[str, Any]]:
        """Every rank's counters."""
        return self.each_rank("redrafter_stats")

    def generate(self, prompts: Any, params: Any) -> list[Any]:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(requests, params, use_tqdm=False)

    def shutdown(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def rank_of(worker: Any) -> int:
    return worker.rank


def reset(worker: Any, oracles: list[Oracle] | None, agree: bool) -> None:
    """Forget counters.

    Args:
        oracles: who drafts on each rank; None for the drafter.
        agree: whether all ranks take the first rank's draft.
    """
    runner = worker.model_runner
    runner.redrafter_stats = ReDrafterStats()
    runner._several_ranks = agree
    runner._draft_trees = types.MethodType(
        type(runner)._draft_trees if oracles is None else oracles[worker.rank], runner
    )


def break_drafts(worker: Any, ranks: list[int]) -> None:
    """Drafting fails on some ranks; guards are as after the start."""
    runner = worker.model_runner
    runner.draft_guard.__init__(lambda: runner.redrafter_stats)
    runner.draft_guard.serving = True
    draft_guard.ERRORS_IN_A_ROW = FEW
    if worker.rank in ranks:

        def fail(*args: Any) -> Any:
            raise RuntimeError("a fault put here")

        runner._draft_trees = fail


def load_drafters(worker: Any, directories: list[str]) -> None:
    """Load another drafter, on each rank one of its own."""
    from dataclasses import replace

    runner = worker.model_runner
    drafter = runner.drafter
    drafter.options = replace(drafter.options, model=directories[worker.rank])
    drafter.load_model(runner.model)


def load_strictly(worker: Any, directories: list[str]) -> str | None:
    """Load a drafter that must know its target; what was said against it.

    The rank's drafter stays as it was.
    """
    from dataclasses import replace

    from vllm_redrafter.drafter.config import DrafterError
    from vllm_redrafter.engine.v1.proposer import ReDrafterProposer

    runner = worker.model_runner
    proposer = ReDrafterProposer(runner.vllm_config)
    proposer.options = replace(
        proposer.options, model=directories[worker.rank], fail_on_target_mismatch=True
    )
    try:
        proposer.load_model(runner.model)
    except DrafterError as error:
        return str(error)
    return None


def read_tables(worker: Any, ids: list[int]) -> dict[str, Any]:
    """What a drafter would read of the target's tables, and what this rank holds itself."""
    model = worker.model_runner.model
    embedding, head = target_tables(model)
    return {
        "embedding": embedding.tolist(),
        "head": head[:].tolist(),
        "rows": head[torch.tensor(ids)].tolist(),
        "shape": tuple(head.shape),
        "own_rows": model.lm_head.weight.shape[0],
        "kv_heads": {
            layer.kv_cache.shape[1]
            for layer in worker.model_runner.compilation_config.static_forward_context.values()
        },
    }
