# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' tests once more, emulated, under the address and UB sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def under_sanitizers(*command: str) -> subprocess.CompletedProcess:
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        # Python and torch keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "REDRAFTER_EMULATION_SANITIZE": "1",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=HERE.parents[1], env=env, capture_output=True, text=True
    )


def test_a_read_out_of_bounds_is_reported():
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
import torch
from emulation.build import load_source
load_source(Path({str(HERE)!r}) / "emulation/toys.cu")
x = torch.ones(1, 128)
torch.ops.redrafter_toys.run(torch.empty(1), x, x, 0)
print("in bounds", flush=True)
torch.ops.redrafter_toys.run(torch.empty(32), x, x, 6)
"""
    done = under_sanitizers("-c", code)
    assert done.stdout == "in bounds\n", done.stderr[-3000:]
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "toys.cu" in done.stderr


@pytest.mark.slow
def test_kernels_stay_in_bounds():
    files = sorted(str(path) for path in HERE.glob("test_cuda_*.py"))
    files.remove(str(HERE / "test_cuda_build.py"))
    done = under_sanitizers("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                            "-m", "not gpu and not slow", *files)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "Sanitizer" not in done.stderr
