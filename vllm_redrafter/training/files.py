# SPDX-License-Identifier: Apache-2.0
"""Files that are either there and whole, or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vllm_redrafter.training.errors import TrainingError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` aside, sync it, and move it into place; an older file stays until then.

    Raises:
        TrainingError: the disk is full or not writable; nothing half written is left behind.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if error.errno in _FULL:
            raise TrainingError(
                f"'{path.name}' was not written, because {_FULL[error.errno]}; everything that was "
                f"finished before is kept: free some space at '{path.parent}' and run the same "
                "command again."
            ) from error
        raise TrainingError(
            f"'{path}' cannot be written ({error.strerror}); give another --out."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of readable JSON."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def make_directory(path: Path) -> None:
    """Create ``path``; raises TrainingError when it is a file or cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"the directory '{path}' cannot be created ({error.strerror}); give another --out."
        ) from error


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def locked(directory: Path, what: str):
    """Hold ``directory`` for this process; TrainingError when another run holds it."""
    import fcntl  # not on Windows, where vLLM does not run either

    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another run writes {what} in '{directory}'; wait for it or give another --out."
            ) from error
        yield
