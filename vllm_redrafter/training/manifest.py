# SPDX-License-Identifier: Apache-2.0
"""A dataset's ``manifest.json``: what has to stand in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_redrafter.reading import is_file_name, is_integer, one_line, parse_json, shown
from vllm_redrafter.training.errors import TrainingError

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "vllm-redrafter-data", 1

_MOST = 2**62
_COUNTS = ("number", "sequences", "tokens", "answer_tokens")


def read_manifest(directory: Path) -> dict[str, Any]:
    """``manifest.json`` of a dataset, with every field that is ever read checked.

    Raises:
        TrainingError: it is not one of ours, or has a field that cannot be.
    """
    path = directory / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        said = manifest["format"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"'{path}' is not a dataset's manifest ({one_line(error)}); give another directory."
        ) from error
    if said != (FORMAT, FORMAT_VERSION):
        raise TrainingError(
            f"'{path}' has format {shown(said[0])} version {shown(said[1])}, not "
            f"{FORMAT!r} version {FORMAT_VERSION}; make the data anew."
        )
    problem = _problem(manifest)
    if problem:
        raise TrainingError(f"'{path}': {problem}; make the data anew, or restore the file.")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the fields, or None."""
    for name in ("target", "tokenizer_sha256"):
        if not isinstance(manifest.get(name), (str, type(None))):
            return f"{name} is {shown(manifest[name])}, not a text"
    size = manifest.get("vocab_size")
    if size is not None and not is_integer(size, 1, _MOST):
        return f"vocab_size is {shown(size)}, not a positive number"
    for name in ("options", "totals"):
        if not isinstance(manifest.get(name, {}), dict):
            return f"{name} is {shown(manifest[name])}, not an object"
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        return f"shards is {shown(shards)}, not a list of objects"
    for at, entry in enumerate(shards):
        if problem := _problem_of_shard(entry):
            return f"shard {at} of the list: {problem}"
    for name in ("number", "file"):
        if len({entry[name] for entry in shards}) != len(shards):
            return f"two shards have the same {name}"
    return None


def _problem_of_shard(entry: dict[str, Any]) -> str | None:
    for name in _COUNTS:
        if not is_integer(entry.get(name), 0, _MOST):
            return f"{name} is {shown(entry.get(name))}, not a count"
    dropped = entry.get("dropped")
    if not isinstance(dropped, dict) or not all(
        is_integer(count, 0, _MOST) for count in dropped.values()
    ):
        return f"dropped is {shown(dropped)}, not an object of counts"
    # States are kept for some datasets only; then both of their fields are there.
    files = [("file", "sha256")]
    if "states" in entry or "states_sha256" in entry:
        files.append(("states", "states_sha256"))
    for name, digest in files:
        if not is_file_name(entry.get(name)):
            return f"{name} is {shown(entry.get(name))}, not the name of a file beside the manifest"
        if not isinstance(entry.get(digest), str):
            return f"{digest} is {shown(entry.get(digest))}, not a SHA-256"
    return None
