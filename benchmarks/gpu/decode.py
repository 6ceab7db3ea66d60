# SPDX-License-Identifier: Apache-2.0
"""Decode steps of one engine at several batch sizes, in this process: started by ``stages.py``.

    python decode.py JOB.json RESULT.json

Synthetic acceptance, dummy weights: a step's time is measured, what is said means nothing.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from spans import Clock, attach, split
from synthetic import SyntheticAcceptance


def runner_of(llm: Any) -> Any:
    """The model runner of an engine that lives in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def generate(llm: Any, batch: int, context: int, tokens: int) -> None:
    from vllm import SamplingParams

    source = random.Random(batch)
    vocab = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": [source.randrange(3, vocab) for _ in range(context)]}
        for _ in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params, use_tqdm=False)


def counters(runner: Any) -> dict[str, Any]:
    return runner.model_state.stats.summary() if runner.speculator is not None else {}


def measure(llm: Any, job: dict[str, Any], clock: Clock) -> list[dict[str, Any]]:
    """One row per point ``(batch, context)`` of the job; a sentence where it could not run."""
    runner, rows = runner_of(llm), []
    nodes = job["spec"]["num_speculative_tokens"] if job["spec"] else 0
    for batch, context in job["points"]:
        row: dict[str, Any] = {"batch": batch, "context": context}
        rows.append(row)
        # Tokens that are emitted in the steps that are wanted, if all goes as the rates say.
        tokens = int(job["steps"] * (1 + sum(job["rates"] if nodes else [])))
        generate(llm, batch, context, 4)  # fills the prefix cache, compiles what was not
        before = counters(runner)
        with clock.recording() as steps:
            generate(llm, batch, context, tokens)
        after = counters(runner)
        try:
            row |= split(steps, batch * (1 + nodes), batch)
        except ValueError as error:
            row["not_run"] = str(error)
            continue
        if nodes:
            drafts = after["drafts"] - before["drafts"]
            row["accepted"] = (accepted_nodes(after) - accepted_nodes(before)) / drafts
            row["moves_per_step"] = (after["moves"] - before["moves"]) / (
                after["steps"] - before["steps"]
            )
    return rows


def accepted_nodes(counted: dict[str, Any]) -> float:
    return (counted["acceptance_length"] - 1) * counted["drafts"]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_redrafter.plugin import register

    register()
    if not job["cuda"]:
        topk_topp_sampler.HAS_TRITON = False  # a kernel that the interpreter cannot run
    # Kept: one that is collected takes vLLM's process groups with it, the next one's too.
    results, engines = [], []
    for name, spec in job["modes"].items():
        job["spec"] = spec
        llm = LLM(**job["llm"], **({"speculative_config": spec} if spec else {}))
        engines.append(llm)
        runner, clock = runner_of(llm), Clock(job["cuda"])
        if runner.speculator is not None:
            sampler = runner.model_state.tree_sampler
            vocab = llm.llm_engine.vllm_config.model_config.get_vocab_size()
            device = torch.device("cuda" if job["cuda"] else "cpu")
            rates = job["rates"][: spec["draft_length"]]
            SyntheticAcceptance(
                runner.model_state.trees, rates, job["ranks"], job["seed"], vocab, device
            ).install(sampler, clock)
        attach(runner, clock)
        results += [{"mode": name, **row} for row in measure(llm, job, clock)]
    Path(sys.argv[2]).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
