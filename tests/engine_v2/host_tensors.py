# SPDX-License-Identifier: Apache-2.0
"""Sees what a captured region would copy from the host, which ends a GPU's capture.

The region runs with tensors of PyTorch's device without memory, ``meta``: what is on the CPU then
comes from the host.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostTensors(TorchDispatchMode):
    """Within it, ``found`` lists operators that take or make a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls += 1
        leaves = tree_leaves((args, kwargs, made))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_cpu for leaf in leaves):
            self.found.append(str(func))
        return made
