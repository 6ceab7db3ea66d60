# SPDX-License-Identifier: Apache-2.0
"""Runs under a CUDA build of torch: loads ``_ops.so`` and prints what became of it as JSON.

    python -S probe.py LIBRARY {as-is,without-showing}

No GPU is needed. CUDA tensors here are CPU memory that DLPack calls a GPU's: operators are
dispatched as on a GPU, and the first call into CUDA's runtime fails.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from vllm_redrafter.ops import library

# What the toolchain leaves empty in every library.
OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable",
            "__cxa_finalize"}  # fmt: skip
ON_CUDA = 2


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(device).value = ON_CUDA
    return torch._C._from_dlpack(capsule)


def symbols(path: Path) -> dict[str, bool]:
    """Name -> whether the loader found it, of all that the loaded library takes from others."""
    mapped = Path("/proc/self/maps").read_text()
    base = int(re.search(rf"^(\w+)-.*{re.escape(str(path))}$", mapped, re.MULTILINE)[1], 16)
    listed = subprocess.run(["readelf", "-rW", path], capture_output=True, text=True, check=True)
    found = {}
    relocation = r"^(\w+)\s+\w+\s+R_X86_64_(?:GLOB_DAT|JUMP_SLOT|64)\s+(\w+) (\S+)"
    for offset, value, name in re.findall(relocation, listed.stdout, re.MULTILINE):
        slot = ctypes.c_uint64.from_address(base + int(offset, 16)).value
        if int(value, 16) == 0:  # not the library's own
            found[name.split("@")[0]] = slot != 0
    return {name: good for name, good in found.items() if name not in OPTIONAL}


def calls() -> dict[str, tuple]:
    """Arguments for every operator, good enough to get as far as the device."""

    def ints(*shape: int) -> torch.Tensor:
        return on_cuda(torch.zeros(shape, dtype=torch.int64))

    def narrow(*shape: int) -> torch.Tensor:
        return on_cuda(torch.zeros(shape, dtype=torch.int32))

    def floats(*shape: int) -> torch.Tensor:
        return on_cuda(torch.zeros(shape))

    draft = ints(1, 2, 3), ints(1, 2, 3), floats(1, 2, 3)
    tree = ints(1, 4), ints(1, 4), ints(1, 4), ints(1, 4, 1), ints(1)
    cache = floats(2, 1, 16, 16)
    one = narrow(1)
    return {
        "beam_step": (ints(1, 3), ints(1, 3), floats(1, 3), None, floats(1, 1, 8), floats(1, 3),
                      None, None, 0),
        "draft": (*draft, floats(1, 4), ints(1), floats(5, 4), None, [], 5, 8, 0, False, 0),
        "build_tree": (*tree, ints(1), *draft, True),
        "merge_candidates": (ints(1, 4), ints(1, 4), ints(1, 4), floats(1, 4), ints(1, 4), ints(1),
                             *draft, None, None, None),
        "choose_tree": (*tree, ints(1, 4), ints(1), ints(1, 3), ints(1, 3), ints(1, 3), ints(1),
                        ints(1)),
        "tree_attention": (floats(1, 1, 16), floats(1, 1, 16), cache, cache, None, None,
                           narrow(1, 1), one, one, one, one, ints(1, 1), 1.0, 0.0),
        "walk": (ints(1, 3), ints(1), ints(1), ints(1), ints(1, 4), ints(1, 4), ints(1),
                 ints(1, 4)),
        "suffix_lookup": (ints(1, 1, 2), ints(1, 1), floats(1, 1, 2), narrow(1, 8), one, one, one,
                          4, 4),
        "move_kv": (ints(1, 10), None, None, ints(1), ints(1), 16, 16, 2),
    }  # fmt: skip


def error_of(name: str, args: tuple) -> str:
    try:
        getattr(torch.ops.redrafter, name)(*args)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "none"


def main() -> None:
    library.LIBRARY = Path(sys.argv[1])
    if sys.argv[2] == "without-showing":
        library._show_torch_cuda = lambda: None
    loaded = library.compiled_available()
    torch.cuda._lazy_init = lambda: None
    print(json.dumps({
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "why_not": library.why_not(),
        "operators": [name for name in library.OPERATORS if name not in library.CPU_ONLY],
        "symbols": symbols(library.LIBRARY) if loaded else {},
        "errors": {name: error_of(name, args) for name, args in calls().items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
