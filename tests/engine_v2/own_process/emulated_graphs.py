# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs as far as a CPU can show them: what was captured is run again, and nothing else.

At capture every operator call is written down with the tensors it got: a tensor from outside as an
address (storage, offset, shape, strides) that the graph does not keep alive, a tensor made inside
as itself, like memory of a graph's pool. A replay runs those calls and no Python of the engine. So
a buffer that moved, a value that was read on the host and a branch that was taken at capture stay
as they were, as on a GPU. Not shown: streams, and kernels that no dispatcher sees.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# Written in Python, and looking things up in a context that a replay does not have: vLLM's direct
# call must be captured instead (``Attention.use_direct_call``).
OPAQUE = ("vllm::unified_attention_with_output", "vllm::unified_kv_cache_update")


class GoneError(RuntimeError):
    """A replay would read or write memory that is no longer there."""


@dataclass(frozen=True)
class Address:
    """A tensor from outside the graph, which does not keep it alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor):
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self):
        if self.storage.expired():
            raise GoneError(f"a graph uses a {self.dtype} tensor of shape {list(self.shape)}")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        made = torch.empty(0, dtype=self.dtype)
        return made.set_(storage, self.offset, self.shape, self.stride)


class EmulatedGraph(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``; as a mode it captures."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.replays = 0
        self._inside = {}  # storage -> a tensor that keeps it

    def _kept(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.untyped_storage()._cdata in self._inside:
            return value
        return Address.of(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func._schema.name not in OPAQUE, f"{func} cannot be captured here"
        if func._schema.name.startswith(("c10d::", "_c10d_functional::")):
            raise RuntimeError(f"a captured region waits for other ranks: {func}")
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
            raise RuntimeError(f"a captured region reads the device: {func}")
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_flatten((args, kwargs))[0]
            if isinstance(leaf, torch.Tensor)
        }
        kept = tree_map(self._kept, (args, kwargs))
        made = func(*args, **kwargs)
        leaves, _ = tree_flatten(made)
        fresh = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                cdata = leaf.untyped_storage()._cdata
                if cdata not in given:
                    self._inside[cdata] = leaf
                    fresh.append(leaf)
                else:
                    fresh.append(None)  # a view of an argument, or the argument itself
            else:
                assert leaf is None, f"{func} returned a {type(leaf).__name__} to the host"
                fresh.append(None)
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if writes or any(leaf is not None for leaf in fresh):
            self.calls.append((func, kept, fresh))
        return made

    @torch.inference_mode()
    def replay(self):
        self.replays += 1
        for func, kept, fresh in self.calls:
            leaves, spec = tree_flatten(kept)
            args, kwargs = tree_unflatten(
                [leaf.tensor() if isinstance(leaf, Address) else leaf for leaf in leaves], spec
            )
            again, _ = tree_flatten(func(*args, **kwargs))
            for old, new in zip(fresh, again, strict=True):
                if old is not None and old.numel():
                    old.copy_(new)


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None):
    """Stands in for ``torch.cuda.graph``."""
    with graph:
        yield


def patch_torch(monkeypatch):
    """What vLLM's graph managers ask of CUDA, emulated."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils

    for name, value in {
        "graph_capture": lambda device: contextlib.nullcontext(),
        "capture_pool": lambda pool, config: contextlib.nullcontext(),
        "current_stream": lambda: None,
    }.items():
        monkeypatch.setattr(cudagraph_utils, name, value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(CpuPlatform, "get_global_graph_pool", lambda self: None, raising=False)
