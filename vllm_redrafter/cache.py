# SPDX-License-Identifier: Apache-2.0
"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_path() -> Path:
    """``$VLLM_REDRAFTER_CACHE``, else a folder of ``$XDG_CACHE_HOME`` or of ``~/.cache``."""
    named = os.environ.get("VLLM_REDRAFTER_CACHE")
    if named:
        return Path(named).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "vllm-redrafter"
