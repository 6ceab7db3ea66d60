# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA operators for the CPU, on top of the emulation beside this file.

``load("draft")`` compiles ``csrc/cuda/draft.cu``, the very file that nvcc compiles, with a C++
compiler and registers it as ``torch.ops.redrafter_emulated.draft`` for CPU tensors. A line
``// emulate-with: other.cu`` near the top of a source names further sources that it calls into.

``load_cpu()`` compiles ``csrc/cpu`` once more, as ``torch.ops.redrafter``, for one instruction set:
that of this machine. It is for processes that have not loaded the package's own library.

``REDRAFTER_EMULATION_SANITIZE=1`` builds with the address and undefined behaviour sanitizers;
their runtime must then be preloaded (``test_sanitizer.py`` does that).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
NAMESPACE = "redrafter_emulated"

_COMMON = [
    "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    f"-DREDRAFTER_LIBRARY={NAMESPACE}", "-DREDRAFTER_CUDA_KEY=CPU",
    f"-I{ROOT / 'csrc'}", f"-I{HERE}",
]  # fmt: skip
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def sanitized() -> bool:
    return os.environ.get("REDRAFTER_EMULATION_SANITIZE") == "1"


def _flags() -> list[str]:
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    system = [part for path in includes for part in ("-isystem", str(path))]
    return [*_COMMON, *system, *(_SANITIZE if sanitized() else [])]


@functools.cache
def _state() -> str:
    """Of everything that a library depends on: headers, flags, the compiler, torch."""
    digest = hashlib.sha256(repr(_flags()).encode() + torch.__version__.encode())
    compiler = subprocess.run([_compiler(), "--version"], capture_output=True, check=True)
    digest.update(compiler.stdout)
    for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *HERE.glob("*.*")]):
        if path.suffix in (".h", ".cuh", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found:
        raise RuntimeError("The emulation of CUDA kernels needs a C++ compiler: install g++.")
    return found


def _build(name: str, sources: list[tuple[Path, list[str]]]) -> Path:
    """One shared library from ``sources`` (each with flags of its own), unless it is there."""
    digest = hashlib.sha256(_state().encode())
    for path, extra in sources:
        digest.update(path.read_bytes() + repr(extra).encode())
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    lib = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = []
        for path, extra in sources:
            output = Path(scratch) / f"{path.stem}{path.suffix[1:]}.o"
            objects.append(str(output))
            command = [_compiler(), *_flags(), *extra, "-x", "c++", "-c", str(path), "-o", output]
            subprocess.run([str(part) for part in command], check=True)
        made = Path(scratch) / library.name
        link = [_compiler(), "-shared", "-o", str(made), *objects, f"-L{lib}", "-ltorch_cpu",
                "-lc10", *(_SANITIZE if sanitized() else [])]  # fmt: skip
        subprocess.run(link, check=True)
        made.replace(library)
    return library


@functools.cache
def _load_schema() -> None:
    path = _build("schema", [(ROOT / "csrc/schema.cpp", [])])
    torch.ops.load_library(str(path))


@functools.cache
def _load_operator(source: Path) -> ctypes.CDLL:
    _load_schema()
    further = re.findall(r"^// emulate-with: (\S+)$", source.read_text(), re.MULTILINE)
    sources = [(source, []), (HERE / "cuda_emulation.cpp", [])]
    sources += [(source.parent / name, ["-DREDRAFTER_NO_REGISTRATION"]) for name in further]
    path = _build(source.stem, sources)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def operator_library(name: str) -> ctypes.CDLL:
    """The library of ``csrc/cuda/<name>.cu``, compiled and loaded."""
    return _load_operator(ROOT / "csrc/cuda" / f"{name}.cu")


# One variant under one name, and no threads: what they share is not tested here.
_CPU = [
    "-UREDRAFTER_LIBRARY", "-DREDRAFTER_LIBRARY=redrafter", "-O1", "-march=native",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-error",
]  # fmt: skip


@functools.cache
def load_cpu() -> object:
    """``torch.ops.redrafter`` from ``csrc/cpu``, compiled here; the package uses it too.

    Raises:
        RuntimeError: the package has loaded another library before.
    """
    sources = []
    for path in sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]):
        variant = ["-DREDRAFTER_VARIANT=isa_baseline"] if path.stem.endswith("_kernel") else []
        sources.append((path, [*_CPU, *variant]))
    from vllm_redrafter.ops import library

    built = _build("cpu", sources)
    if library._load.cache_info().currsize:
        raise RuntimeError("The package's own operators are loaded already.")
    library.LIBRARY = built
    if not library.compiled_available():
        raise RuntimeError(library.why_not())
    return torch.ops.redrafter


def load_source(source: Path, seed: int = 0) -> None:
    """Compile and load one ``.cu`` file; its kernels run blocks and threads in the seed's order."""
    _load_operator(source).redrafter_emulation_seed(ctypes.c_uint64(seed))


def load(*operators: str, seed: int = 0) -> object:
    """``torch.ops.redrafter_emulated`` with these operators; none named: with all of them.

    Args:
        operators: names of ``csrc/cuda/<name>.cu``.
        seed: of the order in which blocks and threads run from now on.

    Raises:
        subprocess.CalledProcessError: a source does not compile.
    """
    for name in operators or sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")):
        load_source(ROOT / "csrc/cuda" / f"{name}.cu", seed)
    return getattr(torch.ops, NAMESPACE)
