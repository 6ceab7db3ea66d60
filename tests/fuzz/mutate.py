# SPDX-License-Identifier: Apache-2.0
"""Damaged files, from good ones and a seeded generator."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

from safetensors.torch import save as save_tensors

# Sizes that fit nothing, types that nobody expects, names that lead elsewhere.
WILD = (
    None, True, False, 0, 1, -1, 2, 3, 63, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**40, 10**9, 10**18,
    2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, 1.9, -0.0, 64.0, 1e300, math.inf,
    -math.inf, math.nan, "", "64", "true", "redrafter", "../model.safetensors", "/etc/passwd",
    "a/b.safetensors", "..", ".", "\0", "\ud800", "\u00e9" * 400, "line\nline", "float32", [], [[]],
    [1, 2, 3], [[1, 8, 3]], ["x"], {}, {"a": 1}, {"": None},
)  # fmt: skip

DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
          "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "X", "")  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    for key, item in items:
        found.append((value, key))
        _places(item, found)
    return found


def changed(value: Any, source: random.Random, times: int = 1) -> Any:
    """A copy of a JSON value with some fields replaced, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places = _places(value)
        if not places:
            return source.choice(WILD)
        (container, key), (other, other_key) = source.choice(places), source.choice(places)
        kind = source.randrange(8)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[source.choice(("x", "", "draft_vocab", "states", str(key) * 2))] = (
                source.choice(WILD)
            )
        elif kind == 2 and type(container[key]) in (int, float):
            container[key] = source.choice((1, -1, 2, 0.5, 10**6, 2**32)) * container[key] + (
                source.choice((0, 1, -1))
            )
        elif kind == 3:
            # Deep copies, or a container might come to hold itself.
            here, there = copy.deepcopy(container[key]), copy.deepcopy(other[other_key])
            container[key] = there
            if other is not container[key]:
                other[other_key] = here
        elif kind == 4 and isinstance(container[key], list):
            container[key] = container[key] * source.choice((0, 2)) + container[key][:1]
        else:
            container[key] = copy.deepcopy(source.choice(WILD))
    return value


def spoilt(data: bytes, source: random.Random) -> bytes:
    """The bytes cut, overwritten, doubled, or something else entirely."""
    kind, at = source.randrange(9), source.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind in (1, 2):
        out = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            if out:
                out[source.randrange(len(out))] = source.randrange(256)
        return bytes(out)
    if kind == 3:
        return data[:at] + source.randbytes(source.randrange(1, 9)) + data[at:]
    if kind == 4:
        end = source.randrange(at, len(data) + 1)
        return data[:end] + data[at:]
    if kind == 5:
        end = min(len(data), at + source.randrange(1, 40))
        return data[:at] + data[end:]
    return source.choice((
        b"", b"\xef\xbb\xbf" + data, b"[" * 100_000, b'{"a":' * 30_000, b"\xff\xfe", b"null", b"[]",
        b"1", b'"x"', b"\0" * 64, b"9" * 6000, data * 2,
    ))  # fmt: skip


def json_bytes(value: Any, source: random.Random) -> bytes:
    """The value as a file, spoilt now and then."""
    data = json.dumps(value).encode()
    return spoilt(data, source) if source.random() < 0.1 else data


def safetensors_bytes(data: bytes, source: random.Random) -> bytes:
    """A safetensors file with another header, other bytes, or another length in front."""
    kind = source.random()
    if kind < 0.3:
        return spoilt(data, source)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[source.choice(names)]
    if kind < 0.5:
        entry["dtype"] = source.choice(DTYPES)
    elif kind < 0.6:
        entry["shape"] = [source.choice((0, 1, 2, 64, 2**31, 2**62, 2**63, -1)) for _ in range(
            source.randrange(4))]  # fmt: skip
    elif kind < 0.65:
        entry["shape"] = entry["shape"][::-1]
    elif kind < 0.7:
        other = header[source.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind < 0.75:
        name = source.choice(names)
        header[source.choice(("", "x", "lm_head.9.weight", "\u00e9" * 99))] = header.pop(name)
    else:
        header = changed(header, source, source.randrange(1, 3))
    text = json.dumps(header).encode()
    length = len(text) if source.random() < 0.95 else source.choice((0, 1, len(text) + 1, 2**63))
    return length.to_bytes(8, "little") + text + body


def other_tensors(tensors: dict[str, Any], source: random.Random) -> bytes:
    """A sound safetensors file whose tensors are of other kinds, shapes or values."""
    import torch

    tensors = dict(tensors)
    for _ in range(source.randrange(1, 3)):
        if not tensors:
            break
        name = source.choice(sorted(tensors))
        tensor = tensors[name]
        kind = source.randrange(8)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensor.to(source.choice(
                (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
            ))  # fmt: skip
        elif kind == 2:
            tensors[name] = tensor.flatten()[: source.randrange(tensor.numel() + 1)]
        elif kind == 3:
            tensors[name] = tensor.unsqueeze(source.choice((0, -1)))
        elif kind == 4 and tensor.numel():
            values = tensor.clone().flatten()
            wild = (-1, 0, 1, 320, 2**31 - 1, 2**31, 2**40, -(2**62), 1.9, math.nan, math.inf)
            fits = [v for v in wild if values.is_floating_point() or _fits(v, values.dtype)]
            values[source.randrange(len(values))] = source.choice(fits)
            tensors[name] = values.view(tensor.shape)
        elif kind == 5:
            tensors[name] = torch.cat([tensor, tensor]) if tensor.dim() else tensor
        elif kind == 6:
            tensors["surplus"] = torch.ones(2)
        else:
            other = source.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
    return save_tensors({name: tensor.clone().contiguous() for name, tensor in tensors.items()})


def _fits(value: Any, dtype: Any) -> bool:
    import torch

    if dtype == torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(dtype)
    return isinstance(value, int) and limits.min <= value <= limits.max
