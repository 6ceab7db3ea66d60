# SPDX-License-Identifier: Apache-2.0
"""What is said when an engine does not start or dies; the child runs without vLLM's help."""

import time

import pytest

from vllm_redrafter.bench.engine_process import EngineFailed, EngineProcess


@pytest.fixture
def stub_vllm(tmp_path):
    """Environment of a child whose `import vllm` finds the code given to it."""

    def environment(code):
        (tmp_path / "vllm.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path)}

    return environment


def test_a_refused_configuration_is_one_sentence(stub_vllm):
    env = stub_vllm("def LLM(**kwargs):\n    raise ValueError(f'no such model: {kwargs}')")
    engine = EngineProcess("mine", {"model": "m"}, env)
    try:
        engine.start()
        with pytest.raises(EngineFailed, match="^engine 'mine': ValueError: no such model: {'m"):
            engine.wait_ready()
    finally:
        engine.stop()


def test_a_crash_shows_what_was_printed_last(stub_vllm):
    env = stub_vllm("import os\nprint('about to fall', flush=True)\nos._exit(7)")
    engine = EngineProcess("mine", {}, env)
    try:
        engine.start()
        with pytest.raises(EngineFailed, match="(?s)'mine' ended with code 7.*about to fall"):
            engine.wait_ready()
    finally:
        engine.stop()


def test_an_idle_engine_leaves_when_the_pipe_closes(stub_vllm):
    env = stub_vllm("def LLM(**kwargs):\n    return None")
    engine = EngineProcess("mine", {}, env)
    engine.start()
    assert engine.wait_ready() >= 0
    process = engine._process
    began = time.monotonic()
    engine.stop()
    assert process.returncode == 0
    assert time.monotonic() - began < 4  # left by itself: nobody had to kill it
    engine.stop()


def test_a_busy_engine_is_killed(stub_vllm):
    env = stub_vllm("import time\ndef LLM(**kwargs):\n    time.sleep(600)")
    engine = EngineProcess("mine", {}, env)
    engine.start()
    process = engine._process
    engine.stop()
    assert process.returncode == -9
