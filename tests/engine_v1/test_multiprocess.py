# SPDX-License-Identifier: Apache-2.0
"""The default way: an engine core in its own process, the plugin found by its entry point."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

from vllm import SamplingParams

from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts

# Neither this package nor any method is named here: the directory's model_type is enough.
SCRIPT = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(speculative_config=job["speculative_config"], **job["settings"])
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=60),
        use_tqdm=False,
    )
    print("RESULT", json.dumps({
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "stats": llm.collective_rpc("redrafter_stats"),
        "in_process": hasattr(llm.llm_engine.engine_core, "engine_core"),
    }))
"""


def test_one_flag_and_nothing_else(pair, target, taught_drafter, tmp_path):
    found = [point.value for point in entry_points(group="vllm.general_plugins")]
    assert "vllm_redrafter.plugin:register" in found, "install the package to run this test"
    script = tmp_path / "one_flag.py"
    script.write_text(SCRIPT)
    job = {
        "speculative_config": {"model": str(taught_drafter)},
        "settings": {
            "model": str(target),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 64,
        },
        "prompts": prompts(16),
    }
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    assert not result["in_process"]
    [stats] = result["stats"]
    assert stats["drafts"] > 100
    assert stats["acceptance_length"] > 1.2
    pair.plain.reset()
    expected = pair.plain.generate(prompts(16), SamplingParams(temperature=0, max_tokens=60))
    assert result["tokens"] == tokens(expected)
