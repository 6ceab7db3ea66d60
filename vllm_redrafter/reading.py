# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else wrote: their JSON, the names of files in it, and how to show a value."""

from __future__ import annotations

import json
import reprlib
from typing import Any

# The longest name that usual file systems have.
_LONGEST_NAME = 255

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 4, 6, 6
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: Any) -> str:
    """``repr`` of a value from a file, at most a line of it: for messages."""
    return _SHORT.repr(value)


def parse_json(text: str) -> Any:
    """``json.loads`` that raises nothing but ValueError: RecursionError, say, becomes one."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_file_name(value: Any) -> bool:
    """Whether ``value`` names a file of one directory, and leads nowhere else."""
    if not isinstance(value, str) or value in ("", ".", "..") or set("/\\\0") & set(value):
        return False
    try:
        return len(value.encode("utf-8")) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON allows
        return False


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether ``value`` is an int (no bool) of that range."""
    return type(value) is int and least <= value <= most


def one_line(error: BaseException) -> str:
    """What another library said, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
