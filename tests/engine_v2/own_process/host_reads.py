# SPDX-License-Identifier: Apache-2.0
"""Counts what would make a GPU's host wait: tensor values read by code of the package.

On a CPU such reads cost nothing, so they must be looked for. Operators whose result's size depends
on values are reads too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_redrafter

PACKAGE = str(Path(vllm_redrafter.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
}
# For the metrics this reads a copy of the counters once it has arrived, where a step's results are
# waited for in any case. `DeviceStats.copied`, which starts the copy, has no exemption.
ARRIVED = "DeviceStats.copied.<locals>.arrive"
METHODS = (
    "item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__", "__array__",
)  # fmt: skip


def _reader() -> str | None:
    """Where in the package the innermost frame outside torch and this file is, if it is there."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(TORCH):
            ours = name.startswith(PACKAGE) and ARRIVED not in frame.f_code.co_qualname
            return f"{name}:{frame.f_lineno}" if ours else None
        frame = frame.f_back
    return None


class HostReads(TorchDispatchMode):
    """Within it, ``found`` lists reads as (what, where)."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._originals = {}

    def _note(self, what):
        where = _reader()
        if where:
            self.found.append((what, where))

    def __enter__(self):
        for name in METHODS:
            original = getattr(torch.Tensor, name)
            self._originals[name] = (name in vars(torch.Tensor), original)

            def noting(tensor, *args, _name=name, _original=original, **kwargs):
                self._note(_name)
                return _original(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, noting)
        return super().__enter__()

    def __exit__(self, *exc):
        for name, (own, original) in self._originals.items():
            if own:
                setattr(torch.Tensor, name, original)
            else:
                delattr(torch.Tensor, name)
        return super().__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            self._note(name)
        elif name == "aten::index" or name == "aten::index_put_":
            masks = (torch.bool, torch.uint8)
            if any(index is not None and index.dtype in masks for index in args[1]):
                self._note(f"{name} by mask")
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self._note(name)
        return func(*args, **kwargs)
