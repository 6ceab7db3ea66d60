# SPDX-License-Identifier: Apache-2.0
"""The process in which vLLM chooses Model Runner V2, on this CPU.

Triton's interpreter runs vLLM's kernels there, and would run those of Model Runner V1 too: so the
tests of the V1 engine keep a process of their own. The tests over there are
``own_process/v2_*.py``; one process runs all of them that a session asks for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INNER = HERE / "own_process"
ROOT = HERE.parents[1]

# Name of the parameter that says which inner tests an outer one needs: "v2_cases.py::test_case[x]".
PARAMETER = "inner"

_OUTCOMES = pytest.StashKey["Outcomes"]()


@dataclass(frozen=True)
class Outcomes:
    """What became of the inner tests.

    Attributes:
        problems: messages of failed runs by test; tests that ran have an entry.
        streams: folder of what the cases said, ``NAME.json``.
    """

    problems: dict[str, list[str]]
    streams: Path

    def assert_passed(self, inner: str) -> None:
        assert inner in self.problems, "it did not run"
        assert not self.problems[inner], "\n".join(self.problems[inner])


def outcomes(session: pytest.Session, factory: pytest.TempPathFactory) -> Outcomes:
    """Run the inner tests that the session's items name; once per session."""
    if _OUTCOMES not in session.stash:
        wanted = {
            item.callspec.params[PARAMETER]
            for item in session.items
            if PARAMETER in getattr(getattr(item, "callspec", None), "params", {})
        }
        folder = factory.mktemp("v2")
        # If the process fails as a whole, no other test starts it again.
        session.stash[_OUTCOMES] = Outcomes({}, folder)
        session.stash[_OUTCOMES] = _run(sorted(wanted), folder)
    return session.stash[_OUTCOMES]


def _run(wanted: list[str], folder: Path) -> Outcomes:
    report = folder / "report.xml"
    path = [str(ROOT), str(HERE.parent), str(HERE / "harness"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "REDRAFTER_TEST_STREAMS": str(folder),
        "TRITON_INTERPRET": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
    }
    env.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "engine_v2.own_process.fixtures",
            "--slow", "-p", "no:cacheprovider", "--durations=25",
            "-o", "python_files=v2_*.py", f"--junitxml={report}",
            *(str(INNER / inner) for inner in wanted),
        ],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    # Shown by pytest if a test fails.
    print(done.stdout)
    assert report.is_file(), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = f"{case.get('classname').rpartition('.')[2]}.py"
        bad = [
            f"{case.get('name')}: {node.get('message')}\n{node.text}"
            for node in case
            if node.tag in ("failure", "error", "skipped")
        ]
        # Under its own name and under its function's, which all its parameters share.
        for name in {case.get("name"), case.get("name").partition("[")[0]}:
            found.setdefault(f"{file}::{name}", []).extend(bad)
    assert found, done.stdout + done.stderr
    return Outcomes(found, folder)
