# SPDX-License-Identifier: Apache-2.0
"""Files of JSON lines: their lines with numbers, and what a broken one is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        return json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
