# SPDX-License-Identifier: Apache-2.0
"""ReDrafter for vLLM: recurrent beam drafting and tree verification.

The mathematics can be used without an engine::

    drafter = load_drafter(directory, embedding=table, lm_head=head)
    beams = beam_search(drafter, context, token, beam_width=4, draft_length=3)
    tree = build_tree(beams, rule="best", num_nodes=11)
    walk = walk_greedy(tree, target_argmax_at_every_node)

Importing this package imports neither vLLM nor torch until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_redrafter.drafter.beam_search import Beams, beam_search
    from vllm_redrafter.drafter.checkpoint import load_drafter, save_drafter
    from vllm_redrafter.drafter.config import DrafterConfig, DrafterError
    from vllm_redrafter.drafter.model import Drafter
    from vllm_redrafter.tree.build import build_tree
    from vllm_redrafter.tree.tree import Tree
    from vllm_redrafter.tree.walk import Walk, walk_greedy

__version__ = "0.1.0"

_HOME_OF = {
    "Beams": "drafter.beam_search",
    "beam_search": "drafter.beam_search",
    "load_drafter": "drafter.checkpoint",
    "save_drafter": "drafter.checkpoint",
    "DrafterConfig": "drafter.config",
    "DrafterError": "drafter.config",
    "Drafter": "drafter.model",
    "build_tree": "tree.build",
    "Tree": "tree.tree",
    "Walk": "tree.walk",
    "walk_greedy": "tree.walk",
}

__all__ = [
    "Beams",
    "Drafter",
    "DrafterConfig",
    "DrafterError",
    "Tree",
    "Walk",
    "beam_search",
    "build_tree",
    "load_drafter",
    "save_drafter",
    "walk_greedy",
]


def __getattr__(name: str) -> Any:
    # The plugin's entry point imports this package in every vLLM process, asked for or not: keep
    # that import free of torch.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vllm_redrafter' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
