# SPDX-License-Identifier: Apache-2.0
"""How the compiled operators are found, chosen and threaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_redrafter import ops
from vllm_redrafter.ops import library


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
