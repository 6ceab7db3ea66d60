# SPDX-License-Identifier: Apache-2.0
"""CUDA builds of torch in folders of their own, downloaded once.

They lie in ``$VLLM_REDRAFTER_CUDA_TORCH``, or the user's cache: some 5 GB. CUDA's libraries are
those of the newest version and serve all; triton is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

# The oldest torch that the library is for (setup.py), then what vLLM 0.33 pins.
VERSIONS = ("2.11.0", "2.14.0")


def cache() -> Path:
    named = os.environ.get("VLLM_REDRAFTER_CUDA_TORCH")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(home) / "vllm-redrafter" / "cuda-torch"


def _install(folder: Path, *requirements: str) -> Path:
    """Install there, unless that is done. An interrupted installation leaves nothing."""
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir",
               "--no-compile", "--target", str(unfinished), *requirements]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip install {' '.join(requirements)} failed: {done.stderr[-2000:]}")
    unfinished.rename(folder)
    return folder


def _torch(version: str) -> Path:
    return _install(cache() / f"torch-{version}", "--no-deps", f"torch=={version}")


def _libraries() -> Path:
    newest = VERSIONS[-1]
    info = _torch(newest) / f"torch-{newest}.dist-info"
    wanted = [r for r in Distribution.at(info).requires or []
              if not r.startswith("triton") and "extra ==" not in r]  # fmt: skip
    return _install(cache() / f"libraries-of-{newest}", *wanted)


def python_path(version: str) -> str:
    """A PYTHONPATH with that torch, for an interpreter without site-packages (``python -S``).

    Raises:
        RuntimeError: pip failed.
    """
    torch, libraries = _torch(version), _libraries()
    link = torch / "nvidia"  # where torch looks for CUDA's libraries
    if not link.exists():
        link.symlink_to(libraries / "nvidia")
    return os.pathsep.join([str(torch), str(libraries)])
