# SPDX-License-Identifier: Apache-2.0
"""Sessions through ``AsyncLLM.generate``, drafter and lookup at work, the engine in its process."""

import json
import os
import subprocess
import sys

import pytest
from engine_cases.sessions import make_sessions

SCRIPT = """
import asyncio, json, sys


async def session(engine, name, chunks, params):
    async def stream():
        for chunk in chunks:
            yield StreamingInput(prompt={"prompt_token_ids": chunk})

    said = []
    async for output in engine.generate(stream(), params, name):
        said += output.outputs[0].token_ids
    return said


async def answer(job):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["settings"]))
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, **job["params"])
    found = {"said": await asyncio.gather(*(
        session(engine, str(i), chunks, params) for i, chunks in enumerate(job["sessions"])
    ))}
    if "speculative_config" in job["settings"]:
        found["stats"] = await engine.collective_rpc("redrafter_stats")
    engine.shutdown()
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    asyncio.run(answer(json.load(sys.stdin)))
"""


@pytest.mark.slow
def test_sessions_of_the_real_front_end(target, taught_drafter, tmp_path):
    script = tmp_path / "sessions.py"
    script.write_text(SCRIPT)
    settings = {
        "model": str(target), "dtype": "float32", "enforce_eager": True, "max_model_len": 256,
        "max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 128,
    }  # fmt: skip
    ours = {"model": str(taught_drafter), "node_budget": "fixed"}
    found = []
    for more in ({}, {"speculative_config": ours}):
        job = {
            "settings": settings | more,
            # Three times the same: the lookup finds something.
            "sessions": [[chunk * 3 for chunk in one.chunks] for one in make_sessions((6, 6))],
            "params": {"temperature": 0, "max_tokens": 7, "stop_token_ids": list(range(40, 70))},
        }
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        done = subprocess.run(
            [sys.executable, script], input=json.dumps(job), capture_output=True, text=True,
            env=environment, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        found.append(json.loads(line.removeprefix("RESULT ")))
    plain, trees = found
    assert trees["said"] == plain["said"]
    [stats] = trees["stats"]
    assert stats["drafts"] > 30 and stats["draft_errors"] == {}
    assert stats["remembered_trees"] == 0
