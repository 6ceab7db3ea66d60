# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of the target for which a drafter was made; importable without torch.

A drafter reads one model's hidden states and embeds with its table. Another model of the same sizes
takes it without an error, and then no draft is ever accepted. So config.json keeps the target's
sizes, a hash of its vocabulary, and some values of its input embedding and output head, which are
compared at load.

The comparison is of numbers, not of hashes: another dtype, quantisation and light fine-tuning move
the values of a target a little, and it stays the same target. ``difference`` of SmolLM2's embedding
was 0.001 to itself in bfloat16, 0.02 rounded to 8 bits and 0.15 to 4 (in blocks of 32), and from
0.60 to 0.76 to itself with other rows and to random tables (30 trials).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIELD = "target_fingerprint"
VERSION = 1

# Of each table so many rows, and of each row so many values.
ROWS, COLUMNS = 16, 8

# Tables that differ by more are another model's: half way between 4 bits and unrelated values.
MOST_DIFFERENCE = 0.4

Values = tuple[float, ...]


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a target.

    Attributes:
        vocab_size, hidden_size: of its tables, padding not counted.
        num_hidden_layers: None where it is not known.
        tokenizer_sha256: of its (token, id) pairs; None where it has no tokenizer.
        embedding, head: ``ROWS x COLUMNS`` values, row by row (``sample_rows``,
            ``sample_columns``).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int | None
    tokenizer_sha256: str | None
    embedding: Values
    head: Values

    def to_json(self) -> dict[str, Any]:
        """Plain values; the tables' as base64 of little-endian float32."""
        return {
            "version": VERSION,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "tokenizer_sha256": self.tokenizer_sha256,
            "embedding": _pack(self.embedding),
            "head": _pack(self.head),
        }


def parse(value: Any) -> Fingerprint | None:
    """What config.json holds; None for nothing, or for a version that is not known here.

    Raises:
        ValueError: a fingerprint that is none; the message goes behind the name of the field.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}; it must be an object")
    if value.get("version") != VERSION:
        return None
    sizes = {name: value.get(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    for name, size in sizes.items():
        optional = name == "num_hidden_layers" and size is None
        if not optional and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"has {name} {size!r}; it must be an integer >= 1")
    digest = value.get("tokenizer_sha256")
    if digest is not None and not isinstance(digest, str):
        raise ValueError(f"has tokenizer_sha256 {digest!r}; it must be a hexadecimal number")
    tables = {name: _unpack(name, value.get(name)) for name in ("embedding", "head")}
    return Fingerprint(**sizes, tokenizer_sha256=digest, **tables)


def vocab_sha256(vocab: dict[str, int]) -> str:
    """SHA-256 of the sorted (token, id) pairs."""
    return hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()


def sample_rows(vocab_size: int) -> list[int]:
    """``ROWS`` token ids, most of them low: frequent tokens are the ones that training moved."""
    return [round((vocab_size - 1) * (i / (ROWS - 1)) ** 2) for i in range(ROWS)]


def sample_columns(hidden_size: int) -> list[int]:
    """``COLUMNS`` places in a row, evenly spread."""
    return [round((hidden_size - 1) * i / (COLUMNS - 1)) for i in range(COLUMNS)]


def sample(table: Any, vocab_size: int, hidden_size: int) -> Values:
    """A table's values for a fingerprint.

    Args:
        table: ``[>= vocab_size, hidden_size]`` floats: a tensor, or what gives rows by their ids.
    """
    import torch

    ids = torch.tensor(sample_rows(vocab_size))
    rows = table[ids.to(table.device) if isinstance(table, torch.Tensor) else ids]
    return tuple(rows[:, sample_columns(hidden_size)].detach().float().cpu().flatten().tolist())


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two samples are apart, from 0 (equal) to 1 (opposite).

    The mean over all values of |a - b| / (|a| + |b|), rows scaled to a mean square of 1: the scale
    of a row is no matter. Values that are not finite count as opposite.
    """
    total = 0.0
    for start in range(0, ROWS * COLUMNS, COLUMNS):
        a, b = (_scaled(values[start : start + COLUMNS]) for values in (one, other))
        for x, y in zip(a, b, strict=True):
            size = abs(x) + abs(y)
            apart = abs(x - y) / size if size else 0.0
            total += apart if math.isfinite(apart) else 1.0
    return total / (ROWS * COLUMNS)


def _scaled(row: Sequence[float]) -> list[float]:
    size = math.sqrt(sum(value * value for value in row) / len(row))
    return [value / size for value in row] if size else list(row)


def _pack(values: Values) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _unpack(name: str, text: Any) -> Values:
    count = ROWS * COLUMNS
    try:
        return struct.unpack(f"<{count}f", base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error, struct.error) as error:
        raise ValueError(f"has no {count} float32 values of the {name} in base64") from error
