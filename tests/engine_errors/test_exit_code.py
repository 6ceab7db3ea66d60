# SPDX-License-Identifier: Apache-2.0
"""The real programs: the sentence in the output, an exit code that is not 0, no engine started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(command):
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    return subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )


def vllm_serve(target, speculative, *flags):
    vllm = Path(sys.executable).with_name("vllm")
    return run([vllm, "serve", target, "--speculative-config", json.dumps(speculative), *flags])


def python_llm(target, speculative):
    # As a script writes it; the guard keeps a spawned child from running it again.
    code = (
        "import sys, json\n"
        "from vllm import LLM\n"
        "if __name__ == '__main__':\n"
        "    LLM(model=sys.argv[1], speculative_config=json.loads(sys.argv[2]))\n"
    )
    return run([sys.executable, "-c", code, target, json.dumps(speculative)])


def test_llm_with_a_missing_directory(target, tmp_path):
    nowhere = tmp_path / "nowhere"
    done = python_llm(target, {"method": "redrafter", "model": str(nowhere)})
    assert done.returncode not in (0, None)
    assert f"The drafter directory '{nowhere}' does not exist; give the path" in done.stdout
    assert "EngineCore" not in done.stdout


@pytest.mark.parametrize(
    "extra, flags, sentence",
    [
        ({"beams": 3}, (), "unknown key 'beams'; ReDrafter's keys are method, model"),
        ({}, ("--pipeline-parallel-size", "2"), "(pipeline_parallel_size=2): a rank before"),
    ],
)
def test_vllm_serve(target, drafter, extra, flags, sentence):
    done = vllm_serve(target, {"method": "redrafter", "model": str(drafter), **extra}, *flags)
    assert done.returncode not in (0, None)
    assert sentence in done.stdout
    assert "EngineCore" not in done.stdout
