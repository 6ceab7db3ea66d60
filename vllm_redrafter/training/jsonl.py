# SPDX-License-Identifier: Apache-2.0
"""Files of JSON lines: their lines with numbers, and what a broken one is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_redrafter.reading import parse_json
from vllm_redrafter.training.errors import TrainingError


def numbered_lines(path: str | Path, flag: str) -> list[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers from 1.

    Args:
        flag: the option that named the file, for the message.

    Raises:
        TrainingError: the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TrainingError(f"{flag} {path} cannot be read ({error.strerror}).") from error
    # Only a line feed ends a line: other line ends may stand in a JSON string as they are.
    return [(i, line) for i, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def parse_line(line: bytes) -> Any:
    """The line's value; raises ValueError where it is not JSON in UTF-8."""
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error


def is_text(value: Any) -> bool:
    """Whether ``value`` is a string that can be written: JSON has halves of surrogate pairs too."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
