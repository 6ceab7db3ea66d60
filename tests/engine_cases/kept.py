# SPDX-License-Identifier: Apache-2.0
"""Engines that live as long as their process, and one end for all of them.

Each engine's own end collects garbage in a heap that holds all the others: minutes for dozens.
"""

from __future__ import annotations

import atexit
from typing import Any


def end_together(engines: dict[Any, Any]) -> None:
    """At the process's end, drop all engines that are in the dict by then.

    Args:
        engines: values hold an ``LLM`` as ``llm``.
    """
    atexit.register(_end, engines)


def _end(engines: dict[Any, Any]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for engine in engines.values():
        engine.llm.llm_engine.engine_core._finalizer.detach()
    engines.clear()
    cleanup_dist_env_and_memory()
