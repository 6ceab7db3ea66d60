# SPDX-License-Identifier: Apache-2.0
"""Runs ``own_process/v2_*.py`` in a process where vLLM chooses Model Runner V2, on this CPU.

Triton's interpreter runs vLLM's kernels there, and would run those of Model Runner V1 too: so the
tests of the V1 engine keep a process of their own. Every test over there is one here.
"""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INNER = HERE / "own_process"
ROOT = HERE.parents[1]
FILES = sorted(INNER.glob("v2_*.py"))


def functions(path):
    """(name, whether it is marked slow) of every test function in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, any(ast.unparse(d).endswith("slow") for d in node.decorator_list)


CASES = [
    pytest.param(
        path.stem, name, marks=[pytest.mark.slow] if slow else [], id=f"{path.stem}-{name}"
    )
    for path in FILES
    for name, slow in functions(path)
]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory, request):
    """(file, test) -> list of messages of its failed runs; tests that ran have an entry.

    Only what was selected here is run there.
    """
    report = tmp_path_factory.mktemp("v2") / "report.xml"
    wanted = {
        (item.callspec.params["file"], item.callspec.params["name"])
        for item in request.session.items
        if "outcomes" in getattr(item, "fixturenames", ())
    }
    cases = [case.values for case in CASES]
    selected = [f"{INNER / file}.py::{name}" for file, name in cases if (file, name) in wanted]
    path = [str(ROOT), str(HERE.parent), str(HERE / "harness"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TRITON_INTERPRET": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
    }
    env.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "engine_v2.own_process.fixtures",
            "--slow", "-p", "no:cacheprovider",
            "-o", "python_files=v2_*.py", f"--junitxml={report}",
            *selected,
        ],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert report.is_file(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        key = (case.get("classname").rpartition(".")[2], case.get("name").partition("[")[0])
        bad = [node for node in case if node.tag in ("failure", "error", "skipped")]
        found.setdefault(key, []).extend(
            f"{case.get('name')}: {node.get('message')}\n{node.text}" for node in bad
        )
    assert found, done.stdout + done.stderr
    return found


def test_there_are_cases():
    assert len(CASES) > 20


@pytest.mark.parametrize("file, name", CASES)
def test_on_model_runner_v2(outcomes, file, name):
    assert (file, name) in outcomes, "it did not run"
    problems = outcomes[file, name]
    assert not problems, "\n".join(problems)
