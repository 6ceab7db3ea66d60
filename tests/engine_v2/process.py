# SPDX-License-Identifier: Apache-2.0
"""The process in which vLLM chooses Model Runner V2, on this CPU.

Triton's interpreter runs vLLM's kernels there, and would run those of Model Runner V1 too: so the
tests of the V1 engine keep a process of their own. The tests over there are
``own_process/v2_*.py``; one process runs all of them that a session asks for.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
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
_RUNNING = pytest.StashKey["Running"]()


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


def needs_v2(item: pytest.Item) -> bool:
    """Whether a test looks at what became of an inner one."""
    return PARAMETER in getattr(getattr(item, "callspec", None), "params", {})


def start(session: pytest.Session) -> None:
    """Start the process, if the session has tests for it; it runs beside all the others."""
    wanted = sorted({item.callspec.params[PARAMETER] for item in session.items if needs_v2(item)})
    if wanted and not session.config.option.collectonly:
        session.stash[_RUNNING] = Running(wanted)


def stop(session: pytest.Session) -> None:
    """End the process, if it still runs."""
    if _RUNNING in session.stash:
        session.stash[_RUNNING].stop()


def outcomes(session: pytest.Session) -> Outcomes:
    """Of the inner tests that the session's items name; waits for them."""
    if _OUTCOMES not in session.stash:
        running = session.stash[_RUNNING]
        # If the process fails as a whole, no other test waits for it again.
        session.stash[_OUTCOMES] = Outcomes({}, running.folder)
        session.stash[_OUTCOMES] = running.outcomes()
    return session.stash[_OUTCOMES]


class Running:
    """The process."""

    def __init__(self, wanted: list[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="redrafter-v2-"))
        self._report, self._said = self.folder / "report.xml", self.folder / "said"
        paths = [str(ROOT), str(HERE.parent), str(HERE / "harness")]
        paths.append(os.environ.get("PYTHONPATH", ""))
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "REDRAFTER_TEST_STREAMS": str(self.folder),
            "TRITON_INTERPRET": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_PLUGINS": "",
        }
        env.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "pytest", "-q", "-p", "engine_v2.own_process.fixtures",
                    "--slow", "-p", "no:cacheprovider", "--durations=25",
                    "-o", "python_files=v2_*.py", f"--junitxml={self._report}",
                    *(str(INNER / inner) for inner in wanted),
                ],
                cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def outcomes(self) -> Outcomes:
        self._process.wait()
        said = self._said.read_text(encoding="utf-8", errors="replace")
        # Shown by pytest if a test fails.
        print(said)
        assert self._report.is_file(), said
        found: dict[str, list[str]] = {}
        for case in ElementTree.parse(self._report).getroot().iter("testcase"):
            file = f"{case.get('classname').rpartition('.')[2]}.py"
            bad = [
                f"{case.get('name')}: {node.get('message')}\n{node.text}"
                for node in case
                if node.tag in ("failure", "error", "skipped")
            ]
            # Under its own name and under its function's, which all its parameters share.
            for name in {case.get("name"), case.get("name").partition("[")[0]}:
                found.setdefault(f"{file}::{name}", []).extend(bad)
        assert found, said
        return Outcomes(found, self.folder)
