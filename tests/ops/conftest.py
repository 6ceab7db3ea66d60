# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the operator tests. They need the compiled operators: without them they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulation.build import load
from every_second import leave_out_half
from ptx.operators import PtxOperators

from vllm_redrafter.ops.library import ISAS, compiled_available, isa, set_isa, why_not

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every second input only for the PTX interpreter, which takes its time; all of them if asked.

    Every kernel runs in it in test_ptx_kernels.py in any case.
    """
    if os.environ.get("VLLM_REDRAFTER_TEST_ALL_PTX") == "1":
        return
    slow = [item for item in items if getattr(item, "callspec", None)
            and item.callspec.params.get("device_ops") == "ptx"]  # fmt: skip
    leave_out_half(config, items, slow)


@pytest.fixture(autouse=True)
def compiled_operators() -> None:
    assert compiled_available(), why_not()


@pytest.fixture(params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with every variant of the kernels that this processor runs."""
    before = isa()
    try:
        set_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor or build has no {request.param}")
    yield request.param
    set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The whole library, its CUDA half built by nvcc for sm_90 with warnings as errors."""
    folder = ROOT / "build" / "cuda-library"
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys; sys.argv[1:] = ['--version']\n"
        "try:\n    import setup\nexcept SystemExit:\n    pass\n"
        f"from pathlib import Path; setup.build_library(Path({str(folder)!r}))\n"
    )
    env = os.environ | {
        "VLLM_REDRAFTER_CUDA": "1", "VLLM_REDRAFTER_CUDA_ARCHS": "9.0",
        "VLLM_REDRAFTER_WERROR": "1", "VLLM_REDRAFTER_BUILD_OPS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "_ops.so"


@pytest.fixture(
    params=[
        "emulated",
        pytest.param("ptx", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device_ops(request: pytest.FixtureRequest) -> tuple[object, torch.device]:
    """The CUDA operators and the device of their tensors: on the CPU emulated, or nvcc's PTX
    interpreted (tests/ops/ptx), or on a GPU.

    The emulation compiles the operator that the test file is named after, ``test_cuda_<name>.py``.
    """
    if request.param == "cuda":
        return torch.ops.redrafter, torch.device("cuda")
    name = request.path.stem.removeprefix("test_cuda_")
    if request.param == "ptx":
        return PtxOperators(name), torch.device("cpu")
    return load(name), torch.device("cpu")
