# SPDX-License-Identifier: Apache-2.0
"""Data made by vLLM itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_v1.tiny_target import write_target
from training_cases import write_prompts

from vllm_redrafter.training.data import generate_dataset
from vllm_redrafter.training.dataset import load_dataset
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.generate import EngineProcess, Request, engine_env
from vllm_redrafter.training.options import DataOptions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_engines_answer_greedily_and_sampled(tmp_path):
    from transformers import LlamaForCausalLM

    target = write_target(tmp_path / "target")  # says something else after every prompt
    manifest = generate_dataset(
        DataOptions(str(target), str(tmp_path / "d"), str(write_prompts(tmp_path / "p", 12)),
                    raw=True, shard_size=4, max_tokens=20, max_model_len=128, processes=2,
                    temperatures=(0.0, 1.0), max_repeats=1.0),
    )  # fmt: skip
    assert manifest["complete"] and manifest["totals"]["sequences"] > 8
    dataset = load_dataset(tmp_path / "d")
    model = LlamaForCausalLM.from_pretrained(target).eval()
    tokens, answer = dataset.tokens[0].long(), dataset.answer[0]
    best = model(tokens[None]).logits[0].argmax(-1)
    assert (best[:-1] == tokens[1:])[answer[1:]].all()  # the first prompt has temperature 0


def test_an_engine_that_cannot_start_says_why(tmp_path):
    engine = EngineProcess({"model": str(tmp_path)}, {**engine_env(0, 1, []), "VLLM_PLUGINS": ""})
    try:
        with pytest.raises(TrainingError, match="could not run the target|ended unexpectedly"):
            engine.generate([Request([1], 0.0, 4)], 0)
    finally:
        engine.stop()


@pytest.mark.parametrize("watched", [True, False])
def test_engines_end_with_a_parent_that_was_killed(watched):
    engine = (
        "import os, sys, time; from vllm_redrafter.training.generate import end_with_parent; "
        f"{'end_with_parent(0.05); ' if watched else ''}"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {engine!r}], start_new_session=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        deadline = time.monotonic() + (20 if watched else 1)
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(pid) != watched  # without the watch it lives on: the test can see it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        process.stdout.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_engines_share_what_there_is(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert engine_env(1, 4, [])["OMP_NUM_THREADS"] == "2"
    assert [engine_env(i, 3, ["4", "7"])["CUDA_VISIBLE_DEVICES"] for i in range(3)] == [
        "4", "7", "4",
    ]  # fmt: skip
