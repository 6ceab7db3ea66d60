# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the operator tests. They need the compiled operators: without them they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from emulation.build import load

from vllm_redrafter.ops.library import ISAS, compiled_available, isa, set_isa, why_not


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


@pytest.fixture(
    params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device_ops(request: pytest.FixtureRequest) -> tuple[object, torch.device]:
    """The CUDA operators and the device of their tensors: emulated on the CPU, or on a GPU.

    The emulation compiles the operator that the test file is named after, ``test_cuda_<name>.py``.
    """
    if request.param == "cuda":
        return torch.ops.redrafter, torch.device("cuda")
    name = request.path.stem.removeprefix("test_cuda_")
    return load(name), torch.device("cpu")
