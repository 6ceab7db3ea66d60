# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.redrafter_emulated`` whose launchers run nvcc's PTX instead of emulated kernels.

The launchers are the project's own, compiled by the emulation: grids, shared memory and arguments
are those of a GPU with four multiprocessors. Kernels may touch the memory of the tensors that the
operator was called with, and what its launcher allocated.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable

import torch
from emulation.build import load, operator_library

from .compiled import kernels_of
from .machine import Counts, Launch, run
from .memory import GlobalMemory
from .parse import Kernel


class _Argument(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t),
                ("alignment", ctypes.c_size_t)]  # fmt: skip


_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(_Argument), ctypes.c_size_t,
)  # fmt: skip
_ALLOCATED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


class _Info(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p),
                ("name", ctypes.c_char_p), ("address", ctypes.c_void_p)]  # fmt: skip


@functools.cache
def _symbols(library: str) -> dict[int, str]:
    """Offsets in a library to mangled names, hidden ones too."""
    listed = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return {int(row[0], 16): row[2] for row in rows if len(row) == 3 and row[1] in "tTwW"}


def _name_of(function: int) -> str:
    info = _Info()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(function), ctypes.byref(info)):
        raise RuntimeError("a kernel is in no library")
    return _symbols(info.file.decode())[function - info.base]


class PtxOperators:
    """The operators of one ``csrc/cuda/<name>.cu``.

    Args:
        name: of the source.
        measure: count sectors and bank conflicts too.
        kernels: in place of nvcc's, for mutations.

    ``counts`` has an entry (kernel's mangled name, Counts) for each launch since it was cleared.
    """

    def __init__(
        self, name: str, *, measure: bool = False, kernels: dict[str, Kernel] | None = None
    ) -> None:
        self.emulated = load(name)
        self.library = operator_library(name)
        self.measure = measure
        self.kernels = kernels_of(name) if kernels is None else kernels
        self.counts: list[tuple[str, Counts]] = []

    def __getattr__(self, operator: str) -> Callable[..., None]:
        return functools.partial(self._call, operator)

    def _call(self, operator: str, *args: object, **named: object) -> None:
        memory, failed = GlobalMemory(), []
        for tensor in _tensors([*args, *named.values()]):
            storage = tensor.untyped_storage()
            memory.add(storage.data_ptr(), storage.nbytes())
        if operator == "move_kv":
            _add_caches(memory, args)

        def launch(function, sizes, shared_bytes, arguments, count):
            try:
                given = [ctypes.string_at(a.data, a.bytes) for a in arguments[:count]]
                kernel = self.kernels[_name_of(function)]
                one = Launch(kernel, tuple(sizes[:3]), tuple(sizes[3:6]), shared_bytes,
                             _packed(kernel, given))  # fmt: skip
                self.counts.append((kernel.name, run(one, memory, self.measure)))
                return 0
            except Exception as error:  # goes through C++ as a status
                failed.append(error)
                return 1

        callbacks = _LAUNCHER(launch), _ALLOCATED(memory.add)
        self.library.redrafter_emulation_run_with(*callbacks)
        try:
            getattr(self.emulated, operator)(*args, **named)
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise
        finally:
            self.library.redrafter_emulation_run_with(None, None)


def _packed(kernel: Kernel, given: list[bytes]) -> bytes:
    data = bytearray(kernel.param_bytes)
    assert len(given) == len(kernel.params), kernel.name
    for value, (offset, size) in zip(given, kernel.params.values(), strict=True):
        assert len(value) == size, f"{kernel.name}: nvcc and the host disagree on an argument"
        data[offset : offset + size] = value
    return bytes(data)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _add_caches(memory: GlobalMemory, args: tuple) -> None:
    """The caches that move_kv's table (csrc/common/move_kv_table.h) lists."""
    table, block_size, row_bytes = args[0], args[5], args[6] * args[7]
    for row in table.tolist():
        heads, blocks, key_token, value_token = row[6:10]
        for base, block, head, token in (
            (row[0], row[2], row[3], key_token), (row[1], row[4], row[5], value_token),
        ):  # fmt: skip
            last = (blocks - 1) * block + (heads - 1) * head + (block_size - 1) * token
            memory.add(base, last + row_bytes)


