# SPDX-License-Identifier: Apache-2.0
"""Under the address and UB sanitizers: the CUDA kernels' tests, emulated, and wild inputs."""

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
        # An allocation that cannot be is refused, as without sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "REDRAFTER_EMULATION_SANITIZE": "1",
        "PYTHONPATH": str(HERE),
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


@pytest.mark.long
@pytest.mark.slow
def test_kernels_stay_in_bounds():
    files = sorted(str(path) for path in HERE.glob("test_cuda_*.py"))
    files.remove(str(HERE / "test_cuda_build.py"))
    # Every second one: nvcc's code of all of them is run by the PTX interpreter, which sees bounds.
    done = under_sanitizers("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                            "-p", "every_second",
                            "-m", "not gpu and not slow", *files)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "Sanitizer" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("which", "count"), [("cpu", 10), ("cuda", 9)])
def test_wild_inputs_are_refused_or_harmless(which, count):
    """Every operator, with the arguments of `wild_inputs.py`: no report, and no other exception."""
    done = under_sanitizers(str(HERE / "wild_inputs.py"), which, "150", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    # Both occur for all: neither is everything refused, nor does everything pass.
    operators = {name.split()[0] for name in counts}
    assert len(operators) == count, counts
    for name in operators:
        assert int(counts[f"{name} ran"]) >= 15 and int(counts[f"{name} refused"]) >= 15, counts
