# SPDX-License-Identifier: Apache-2.0
"""Loading of the compiled operators, ``torch.ops.redrafter.*``.

The library is optional: without it every operator falls back to its PyTorch twin
(``vllm_redrafter.ops.reference``), which says the same thing slowly.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "_ops.so"
TORCH_CUDA = Path(torch.__file__).resolve().parent / "lib" / "libtorch_cuda.so"

OPERATORS = (
    "beam_step",
    "draft",
    "build_tree",
    "suffix_lookup",
    "merge_candidates",
    "choose_tree",
    "tree_attention",
    "argmax_rows",
    "walk",
    "move_kv",
)

# On CUDA torch's own argmax reads rows at the speed of memory.
CPU_ONLY = ("argmax_rows",)

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def _show_torch_cuda() -> None:
    """Let our library see the names of torch's CUDA half, where this torch has one.

    Our library has torch's current stream as a weak symbol, so that it loads beside a torch without
    CUDA too. Such a symbol stays empty unless its library is visible to all, which torch does not
    make it; and it is looked up only once, when our library is loaded.
    """
    if TORCH_CUDA.is_file():
        ctypes.CDLL(str(TORCH_CUDA), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why not)."""
    if not LIBRARY.is_file():
        return None, (
            "The compiled operators were not built. Install torch and a C++17 compiler first, then "
            "run `VLLM_REDRAFTER_BUILD_OPS=1 pip install .` in the source folder, which says what "
            "is missing."
        )
    try:
        _show_torch_cuda()
        torch.ops.load_library(str(LIBRARY))
        handle = ctypes.CDLL(str(LIBRARY))
        handle.redrafter_isa.restype = ctypes.c_char_p
        handle.redrafter_cuda_architectures.restype = ctypes.c_char_p
        handle.redrafter_set_isa.argtypes = [ctypes.c_char_p]
        handle.redrafter_recognise_layout.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        missing = [name for name in OPERATORS if not hasattr(torch.ops.redrafter, name)]
        if missing:
            raise AttributeError(f"it lacks {', '.join(missing)}")
    except (OSError, RuntimeError, AttributeError) as error:
        return None, (
            f"{LIBRARY.name} does not fit torch {torch.__version__} and this version of the "
            f"package ({error}): rebuild it with `VLLM_REDRAFTER_BUILD_OPS=1 pip install .` in the "
            "source folder."
        )
    return handle, ""


def compiled_available() -> bool:
    """Whether ``torch.ops.redrafter`` is there; loads the library at the first call."""
    return _load()[0] is not None


def library() -> ctypes.CDLL | None:
    """The library's plain C functions; None without it."""
    return _load()[0]


def why_not() -> str:
    """One sentence with the cure when the compiled operators are missing, else ''."""
    return _load()[1]


def cuda_architectures() -> str:
    """Compute capabilities that the library has kernels for, "8.0;9.0+PTX"; '' without any."""
    handle = _load()[0]
    return handle.redrafter_cuda_architectures().decode() if handle else ""


@functools.cache
def _devices() -> frozenset[str]:
    """Device types that the library has kernels for."""
    if not compiled_available():
        return frozenset()
    return frozenset({"cpu", "cuda"} if cuda_architectures() else {"cpu"})


def has_kernel(device: torch.device) -> bool:
    """Whether compiled operators take tensors on such a device; elsewhere the twins do the work."""
    return device.type in _devices()


def isa() -> str:
    """The instruction set of the kernels in use, one of ``ISAS``; '' without the library."""
    handle = _load()[0]
    return handle.redrafter_isa().decode() if handle else ""


def set_isa(name: str) -> None:
    """Use another compiled variant from now on (for tests and measurements).

    Raises:
        ValueError: the name is unknown, or this machine or build lacks that variant.
    """
    handle = _load()[0]
    if handle is None:
        raise ValueError(why_not())
    if handle.redrafter_set_isa(name.encode()) != 0:
        raise ValueError(f"{name!r} is not an instruction set of this machine and build.")
