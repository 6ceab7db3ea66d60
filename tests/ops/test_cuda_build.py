# SPDX-License-Identifier: Apache-2.0
"""The CUDA half of the library compiles, without warnings, and loads where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.compiled import compiled

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "packaging"))
import nvcc as cuda  # noqa: E402

SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
KERNELS = 40  # instances of templates, of all sources

# CI sets the variable: there a missing toolkit is a failure, not a reason to skip.
needs_nvcc = pytest.mark.skipif(
    cuda.find_nvcc() is None and os.environ.get("VLLM_REDRAFTER_TEST_CUDA_BUILD") != "1",
    reason="no nvcc",
)


def rows_of(report: str) -> list[tuple[str, int, int]]:
    """(line, bytes spilled, bytes of stack) of every kernel and architecture."""
    assert all(f"{name}.cu: compiled" in report for name in SOURCES), report
    found = re.findall(r"^(.* (\d+) bytes spilled +(\d+) bytes stack.*)$", report, re.MULTILINE)
    return [(line.strip(), int(spilled), int(stack)) for line, spilled, stack in found]


def assert_only_registers(report: str, kernels: int) -> None:
    rows = rows_of(report)
    assert len(rows) == kernels, report
    assert [line for line, spilled, stack in rows if spilled or stack] == []


@needs_nvcc
def test_compiles_without_warnings_spills_or_stack():
    assert_only_registers((compiled() / "report.txt").read_text(), KERNELS)


@needs_nvcc
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiles_for_every_architecture():
    command = [sys.executable, str(ROOT / "scripts/compile_cuda.py"),
               "--archs", cuda.DEFAULT_ARCHITECTURES]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert arch in done.stdout
    assert_only_registers(done.stdout, 4 * KERNELS)


def test_stack_and_spills_are_noticed():
    """Negative control: the report of a kernel with a stack, and of one that spills."""
    good = "\n".join(f"{name}.cu: compiled in 1 s" for name in SOURCES)
    row = "  sm_90 16 registers {} bytes spilled {:4} bytes stack 0 bytes shared  kernel()"
    assert_only_registers(f"{good}\n{row.format(0, 0)}", 1)
    for spilled, stack in ((8, 0), (0, 544)):
        with pytest.raises(AssertionError):
            assert_only_registers(f"{good}\n{row.format(spilled, stack)}", 1)


def test_warnings_are_errors(tmp_path, monkeypatch):
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        assert os.environ.get("VLLM_REDRAFTER_TEST_CUDA_BUILD") != "1"
        pytest.skip("no nvcc")
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel(int* x) { int unused; *x = 1; }\n")
    command = cuda.compile_command(
        nvcc, source, tmp_path / "unused.o", csrc=ROOT / "csrc", torch_include=tmp_path,
        target_version="0", archs="9.0", warnings_are_errors=True,
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "unused" in done.stdout + done.stderr


@needs_nvcc
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_library_serves_machines_with_and_without_cuda(cuda_library):
    """Built with CUDA beside a torch without it: loads, CPU operators work, CUDA ones are there."""
    check = f"""
import pathlib, torch
from vllm_redrafter.ops import library
library.LIBRARY = pathlib.Path({str(cuda_library)!r})
assert library.compiled_available(), library.why_not()
assert library.cuda_architectures() == "9.0"
assert library.has_kernel(torch.device("cuda")) and library.has_kernel(torch.device("cpu"))
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
for key in ("CPU", "CUDA"):
    names = [n for n in library.OPERATORS if key == "CPU" or n not in library.CPU_ONLY]
    assert all(has_kernel("redrafter::" + name, key) for name in names), key
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.tree import Tree
tree = Tree.from_lists([[5, 6, 7]], [[-1, 0, 1]])
assert walk(tree, torch.tensor([[6, 7, 8]])).next_token.tolist() == [8]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


@pytest.mark.parametrize("entry", ["9", "sm_90", "7.5", "9.0+", ""])
def test_impossible_architectures(entry):
    with pytest.raises(ValueError, match="VLLM_REDRAFTER_CUDA_ARCHS has the entry"):
        cuda.gencode(f"8.0;{entry}")


def test_architectures():
    assert cuda.gencode("8.0;9.0a+PTX") == [
        "-gencode", "arch=compute_80,code=sm_80",
        "-gencode", "arch=compute_90a,code=sm_90a",
        "-gencode", "arch=compute_90a,code=compute_90a",
    ]  # fmt: skip
