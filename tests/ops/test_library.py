# SPDX-License-Identifier: Apache-2.0
"""How the compiled operators are found, chosen and threaded."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vllm_redrafter import ops
from vllm_redrafter.ops import library

ROOT = Path(__file__).resolve().parents[2]


def test_every_operator_is_there():
    assert ops.why_not() == ""
    for name in library.OPERATORS:
        assert hasattr(torch.ops.redrafter, name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime():
    """A second runtime would bring a second set of threads that fight for the same cores."""
    # In a process of its own: libraries that other tests import bring runtimes of theirs.
    code = (
        "import torch; from vllm_redrafter import ops; assert ops.compiled_available();"
        "torch.ones(1 << 16).add_(1); print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    paths = {line.split()[-1] for line in maps.stdout.splitlines() if line}
    runtimes = {p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))}
    assert len(runtimes) == 1, runtimes


def test_environment_lowers_the_instruction_set_and_never_raises_it():
    def isa_with(value: str) -> str:
        code = "from vllm_redrafter import ops; assert ops.compiled_available(); print(ops.isa())"
        env = os.environ | {"VLLM_REDRAFTER_ISA": value}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert isa_with("baseline") == "baseline"
    best = isa_with("")
    assert best in ops.ISAS
    assert isa_with("avx512_bf16") == best  # at most what there is
    assert isa_with("nonsense") == best


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="'sse9' is not an instruction set"):
        ops.set_isa("sse9")


def test_missing_and_unfit_libraries_are_explained(monkeypatch, tmp_path):
    library._load.cache_clear()
    try:
        monkeypatch.setattr(library, "LIBRARY", tmp_path / "_ops.so")
        assert not ops.compiled_available() and "were not built" in ops.why_not()
        assert ops.isa() == ""
        library._load.cache_clear()
        library.LIBRARY.write_bytes(b"no library")
        assert not ops.compiled_available() and "rebuild it" in ops.why_not()
        with pytest.raises(ValueError, match="rebuild it"):
            ops.set_isa("baseline")
    finally:
        library._load.cache_clear()


# -- torch's CUDA half ---------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["a torch with CUDA", "one without"])
def test_torchs_cuda_half_is_shown_before_our_library_is_loaded(monkeypatch, tmp_path, there):
    torch_cuda = tmp_path / "libtorch_cuda.so"
    if there:
        torch_cuda.touch()
    calls = []
    original = ctypes.CDLL

    def load(name, mode=ctypes.DEFAULT_MODE):
        calls.append((name, mode))
        return object() if name == str(torch_cuda) else original(name, mode)

    monkeypatch.setattr(library, "TORCH_CUDA", torch_cuda)
    monkeypatch.setattr(ctypes, "CDLL", load)
    library._load.cache_clear()
    try:
        assert ops.compiled_available(), ops.why_not()
    finally:
        library._load.cache_clear()
    shown, ours = (str(torch_cuda), ctypes.RTLD_GLOBAL), str(library.LIBRARY)
    assert calls[:1] == ([shown] if there else [(ours, ctypes.DEFAULT_MODE)])
    assert {name for name, _ in calls[1:]} == {ours}


def test_where_torchs_cuda_half_is():
    """Beside libtorch_cpu.so, which every torch has."""
    assert library.TORCH_CUDA.with_name("libtorch_cpu.so").is_file()
    assert library.TORCH_CUDA.is_file() == (torch.version.cuda is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of Linux")
def test_the_weak_symbol_is_found(tmp_path):
    """As in csrc/cuda, with stand-ins for torch's CUDA half and for our library.

    The first of two equal stand-ins for ours is loaded without the cure, and finds nothing.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    header = (ROOT / "csrc/cuda/launch.h").read_text(encoding="utf-8")
    (weak,) = re.findall(r'^extern "C" __attribute__\(\(weak\)\)[^;]*;', header, re.MULTILINE)
    stream = "aoti_torch_get_current_cuda_stream"
    asked = set(re.findall(r"handle\.(redrafter_\w+)", Path(library.__file__).read_text("utf-8")))
    sources = {
        "libtorch_cuda": f'extern "C" int {stream}(int, void**) {{ return 7; }}',
        "ours": f"#include <cstdint>\n{weak}\n"
        f'extern "C" int redrafter_isa() {{ return {stream} ? {stream}(0, nullptr) : -1; }}\n'
        + "".join(f'extern "C" void {name}() {{}}\n' for name in asked - {"redrafter_isa"}),
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.cpp").write_text(source, encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", "-o", f"{name}.so", f"{name}.cpp"]
        subprocess.run(command, cwd=tmp_path, check=True)
    shutil.copy(tmp_path / "ours.so", tmp_path / "uncured.so")
    code = """
        import ctypes, sys
        from pathlib import Path
        from vllm_redrafter.ops import library
        folder = Path(sys.argv[1])
        library.OPERATORS = ()
        library.LIBRARY, library.TORCH_CUDA = folder / "uncured.so", folder / "libtorch_cuda.so"
        ctypes.CDLL(str(library.TORCH_CUDA))  # as torch has it: seen by nobody else
        for show in (lambda: None, library._show_torch_cuda):
            library._show_torch_cuda = show
            assert library.why_not() == ""
            library.library().redrafter_isa.restype = ctypes.c_int
            print(library.library().redrafter_isa())
            library._load.cache_clear()
            library.LIBRARY = folder / "ours.so"
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["-1", "7"], done.stdout + done.stderr
