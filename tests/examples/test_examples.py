# SPDX-License-Identifier: Apache-2.0
"""Each example runs as its first lines say, on a tiny target."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "serving"))

from server import Server  # noqa: E402

pytestmark = pytest.mark.slow


def run(name, *args, **env):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, args)],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **env},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory, chat_target, drafter):
    server = Server(
        tmp_path_factory.mktemp("example-server") / "log", chat_target,
        "--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 26),
        # A target that knows nothing would say white space to the end.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
        speculative={"method": "redrafter", "model": str(drafter)},
    )  # fmt: skip
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def test_offline_batch(chat_target, drafter):
    out = run("offline_batch", chat_target, drafter)
    assert out.count("\n> ") == 4
    assert float(re.search(r"acceptance length ([\d.]+)", out)[1]) > 1.05


def test_seeds(chat_target, drafter):
    out = run("seeds", chat_target, drafter)
    assert "4 of 4 answers are plain vLLM's, 4 of them different" in out


def test_streaming_chat(server):
    before = server.metrics()["redrafter_drafts_total"]
    out = run("serve_client", "Why is the sky blue?", OPENAI_BASE_URL=f"{server.url}/v1")
    assert len(out) > 20
    server.post("/v1/completions", {"model": str(server_model(server)), "prompt": "a"})
    assert server.metrics()["redrafter_drafts_total"] > before


def server_model(server):
    """What the server calls its model: the directory that it was given."""
    return server.process.args[2]


def test_structured_output_beside_free_text(server):
    out = run("structured", OPENAI_BASE_URL=f"{server.url}/v1")
    assert re.search(r"^free text: .", out)
    choices = r"\{'city': '(Paris|Rome|Oslo)', 'unit': '(celsius|fahrenheit)'\}$"
    assert re.search(rf"^by a schema: {choices}", out, re.MULTILINE)


def test_show(chat_target, drafter, tmp_path):
    """`vllm-redrafter show`: the steps are the answer, each path is one of its tree's."""
    import json

    from vllm_redrafter.engine.v1.recording import RecordedStep

    command = [sys.executable, "-m", "vllm_redrafter.cli", "show", "Tell me more", "--target"]
    command += [chat_target, "--drafter", drafter, "--svg", tmp_path / "a.svg", "--json"]
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "a.json"), "--dtype", "float32"], env=env,
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [RecordedStep(**s) for s in json.loads((tmp_path / "a.json").read_text())["steps"]]
    assert sum(len(step.said) for step in steps) == 48
    drafted = [step for step in steps if step.tokens]
    assert len(drafted) > 5 and sum(len(step.path) for step in drafted) > len(drafted) / 2
    for step in drafted:
        assert [step.tokens[node - 1] for node in step.path] == step.said[:-1]
        assert [step.parents[node - 1] for node in step.path] == [0, *step.path][: len(step.path)]
    assert "✓ accepted" in done.stdout and f"in {len(steps)} steps" in done.stdout
    assert "acceptance length" in (tmp_path / "a.svg").read_text().replace("&#160;", " ")
