# SPDX-License-Identifier: Apache-2.0
"""nvcc's PTX of csrc/cuda, and what ptxas says of it: compiled once, kept in build/."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .parse import Kernel, parse

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "packaging"))
import nvcc as cuda  # noqa: E402

ARCHITECTURE = "9.0"


def _state() -> str:
    """Of everything that the compilation depends on."""
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: set CUDA_HOME.")
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + torch.__version__.encode())
    sources = [p for p in ROOT.glob("csrc/**/*.*") if p.suffix in (".h", ".cuh", ".cu")]
    for path in sorted([*sources, ROOT / "packaging/nvcc.py", ROOT / "scripts/compile_cuda.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def compiled() -> Path:
    """A folder with ``<source>.ptx`` of all sources and ``report.txt`` of scripts/compile_cuda.py.

    Raises:
        RuntimeError: nvcc is missing, or a source does not compile without warnings.
    """
    folder = ROOT / "build" / f"ptx-{_state()}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        command = [sys.executable, str(ROOT / "scripts/compile_cuda.py"), "--archs", ARCHITECTURE,
                   "--keep-ptx", str(made)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        (made / "report.txt").write_text(done.stdout)
        made.rename(folder)
    return folder


@functools.cache
def kernels_of(*sources: str) -> dict[str, Kernel]:
    """Kernels of ``csrc/cuda/<source>.cu``, and of the sources that it calls into."""
    found: dict[str, Kernel] = {}
    for source in sources:
        found |= parse((compiled() / f"{source}.ptx").read_text())
        if source == "draft":
            found |= kernels_of("beam_step")
    return found
