# SPDX-License-Identifier: Apache-2.0
"""Two replicas of an engine, each of which drafts for its share of the requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts
from vllm import SamplingParams

SCRIPT = """
import asyncio, importlib, json, sys

async def main(job):
    for module in job["imports"]:
        importlib.import_module(module)
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["settings"]))

    async def ask(number, prompt):
        params = SamplingParams(temperature=0, max_tokens=job["max_tokens"])
        async for output in engine.generate({"prompt_token_ids": prompt}, params, str(number)):
            pass
        return list(output.outputs[0].token_ids)

    try:
        said = await asyncio.gather(*(ask(*each) for each in enumerate(job["prompts"])))
        # vLLM asks one replica for a worker's counters; its own metrics name all of them.
        counted = {}
        for entry in get_metrics_snapshot():
            if entry.name.startswith("vllm:spec_decode_num_") and hasattr(entry, "value"):
                counted.setdefault(entry.labels["engine"], {})[entry.name] = entry.value
        print("RESULT", json.dumps({"tokens": said, "counted": counted}))
    finally:
        engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
"""


def check_two_replicas(
    plain: Any,
    target: Path,
    drafter: Path,
    folder: Path,
    *,
    requests: int = 12,
    max_tokens: int = 30,
    imports: Sequence[str] = (),
    **settings: Any,
) -> None:
    """They say what plain vLLM says, and both draft.

    Args:
        plain: an ``Engine`` without drafts.
        drafter: one that drafts well for ``prompts(requests)``.
        folder: for the script.
        imports: modules that the process of the replicas needs.
        settings: of the replicas, beside the usual ones.
    """
    script = folder / "two_replicas.py"
    script.write_text(SCRIPT)
    job = {
        "imports": list(imports),
        "settings": {
            "model": str(target), "dtype": "float32", "enforce_eager": True, "max_model_len": 256,
            "max_num_seqs": 8, "num_gpu_blocks_override": 64, "data_parallel_size": 2,
            "disable_log_stats": False,
            "speculative_config": {"model": str(drafter)},
        } | settings,
        "prompts": prompts(requests),
        "max_tokens": max_tokens,
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(job), capture_output=True, text=True,
        env=environment, cwd=folder, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    plain.reset()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    assert result["tokens"] == tokens(plain.generate(prompts(requests), params))
    assert result["counted"].keys() == {"0", "1"}
    for counted in result["counted"].values():
        drafts = counted["vllm:spec_decode_num_drafts"]
        assert drafts >= requests / 2, counted
        assert counted["vllm:spec_decode_num_accepted_tokens"] > 0.2 * drafts, counted
