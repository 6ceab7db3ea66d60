# SPDX-License-Identifier: Apache-2.0
"""The library that nvcc builds loads whole beside CUDA builds of torch; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_torch.install import VERSIONS, python_path

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).parent / "cuda_torch/probe.py"
# Of CUDA's runtime, where there is no GPU: with a driver, and without one.
NO_DEVICE = ("no CUDA-capable device is detected",
             "CUDA driver version is insufficient for CUDA runtime version")  # fmt: skip

# The first of them builds the library.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def probed(version: str, library: Path, how: str) -> dict:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([python_path(version), str(ROOT)]),
        "LD_BIND_NOW": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-S", "-W", "ignore", str(PROBE), str(library), how]
    done = subprocess.run(command, env=env, cwd=library.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def found(version, cuda_library) -> dict:
    result = probed(version, cuda_library, "as-is")
    assert result["torch"].split("+")[0] == version and result["cuda"], "not a CUDA build"
    assert not result["available"], "this test is for machines without a GPU"
    return result


def test_every_symbol_is_found_weak_ones_too(found):
    assert found["why_not"] == ""
    assert "aoti_torch_get_current_cuda_stream" in found["symbols"]
    assert "aoti_torch_get_data_ptr" in found["symbols"] and len(found["symbols"]) > 50
    assert [name for name, good in found["symbols"].items() if not good] == []


def test_without_a_device_cuda_itself_says_so(found):
    assert set(found["errors"]) == set(found["operators"])
    for name, error in found["errors"].items():
        assert any(words in error for words in NO_DEVICE), f"{name}: {error}"
        assert "redrafter: cuda" in error and "built without CUDA" not in error


def test_a_stream_that_torch_hides_would_be_noticed(version, cuda_library):
    """Negative control: the library loads as it did before, and the weak symbol stays empty."""
    result = probed(version, cuda_library, "without-showing")
    missing = [name for name, good in result["symbols"].items() if not good]
    assert missing == ["aoti_torch_get_current_cuda_stream"]
