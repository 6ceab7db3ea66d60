#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compile csrc/cuda/*.cu with nvcc, warnings as errors, and report what each kernel needs.

No GPU is needed. Exit status 1 if a file does not compile.

    python scripts/compile_cuda.py [OPERATOR ...] [--archs "9.0"] [--jobs N]
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "packaging"))
import nvcc as cuda  # noqa: E402

TARGET_VERSION = "0x020b000000000000ULL"  # setup.py's


def demangled(names: list[str]) -> list[str]:
    """C++ names as people write them, where the toolkit's or the compiler's filter is there."""
    try:
        done = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names
    return [re.sub(r"redrafter::cuda::(\(anonymous namespace\)::)?", "", line)
            for line in done.stdout.splitlines()]  # fmt: skip


class Resources(NamedTuple):
    """Of a kernel on an architecture, from ``ptxas -v``; bytes but for the registers."""

    name: str
    arch: str
    registers: int
    spilled: int
    stack: int
    shared: int  # static only


def resources(ptxas: str) -> list[Resources]:
    found = []
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in entry.finditer(ptxas):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(Resources(
            match["name"], match["arch"], int(match["registers"]),
            int(match["stores"]) + int(match["loads"]), int(match["stack"]),
            int(shared[1]) if shared else 0,
        ))  # fmt: skip
    names = demangled([row.name for row in found])
    return [row._replace(name=name) for name, row in zip(names, found, strict=True)]


def compile_one(
    nvcc: Path, source: Path, archs: str, folder: Path, keep: bool
) -> tuple[bool, str, float]:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: torch is needed for its headers: pip install torch.")
    command = cuda.compile_command(
        nvcc, source, folder / f"{source.stem}.o", csrc=ROOT / "csrc",
        torch_include=Path(spec.submodule_search_locations[0]) / "include",
        target_version=TARGET_VERSION, archs=archs, warnings_are_errors=True,
        extra=("-Xptxas", "-v", *(("-keep", "-keep-dir", str(folder)) if keep else ())),
    )  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", help="default: all")
    parser.add_argument("--archs", default=cuda.architectures())
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep-ptx", type=Path, metavar="DIR", help="copy nvcc's PTX there")
    args = parser.parse_args()
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        print("error: nvcc was not found; set CUDA_HOME.", file=sys.stderr)
        return 1
    known = {path.stem: path for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    if unknown := set(args.operators) - set(known):
        print(f"error: no csrc/cuda/{unknown.pop()}.cu.", file=sys.stderr)
        return 1
    sources = [known[name] for name in args.operators or known]
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(
            lambda source: compile_one(
                nvcc, source, args.archs, Path(folder), args.keep_ptx is not None
            ),
            sources,
        )
        for source, (good, output, seconds) in zip(sources, results, strict=True):
            print(f"{source.name}: {'compiled' if good else 'FAILED'} in {seconds:.0f} s")
            if not good:
                failed = True
                print(output)
                continue
            for row in resources(output):
                print(f"  {row.arch:8} {row.registers:3} registers {row.spilled:4} bytes spilled "
                      f"{row.stack:4} bytes stack {row.shared:6} bytes shared  "
                      f"{row.name[:110]}")  # fmt: skip
            if args.keep_ptx:
                for kept in Path(folder).glob(f"{source.stem}*.ptx"):
                    shutil.copy(kept, args.keep_ptx)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
