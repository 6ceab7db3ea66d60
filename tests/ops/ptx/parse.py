# SPDX-License-Identifier: Apache-2.0
"""PTX text to kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4,
         "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.u32 %r1, [%rd1+4]`` is (("ld", "global", "u32"), ("%r1", "[%rd1+4]"))."""

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str = ""  # the register; "" for none
    negated: bool = False
    line: str = ""  # "file:line" of the source, where nvcc named it

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        text = f"{guard}{'.'.join(self.parts)} {', '.join(self.operands)}"
        return f"{text} ({self.line})" if self.line else text


@dataclass
class Kernel:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    params: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, size
    param_bytes: int = 0
    shared: dict[str, int] = field(default_factory=dict)  # static symbol -> offset
    static_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _split(text: str) -> tuple[str, ...]:
    """Operands; commas inside braces and brackets belong to one."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text))


def _params(kernel: Kernel, text: str) -> None:
    for align, kind, name, count in re.findall(
        r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?", text
    ):
        size = int(count) if count else SIZES[kind]
        offset = _aligned(kernel.param_bytes, int(align) if align else SIZES[kind])
        kernel.params[name] = (offset, size)
        kernel.param_bytes = offset + size


def _statement(kernel: Kernel, text: str, line: str) -> None:
    """Anything that ends in a semicolon, without labels and braces around inline PTX."""
    if found := re.match(r"\.(shared|local) \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
        space, align, name, size = found[1], int(found[2]), found[3], int(found[4])
        if space == "shared":
            kernel.shared[name] = _aligned(kernel.static_bytes, align)
            kernel.static_bytes = kernel.shared[name] + size
        else:
            kernel.local[name] = _aligned(kernel.local_bytes, align)
            kernel.local_bytes = kernel.local[name] + size
        return
    if text.startswith("."):
        return
    found = re.match(r"(?:@(!?)(%\w+) )?(\S+) ?(.*)$", text)
    if not found:
        raise ValueError(f"not PTX: {text!r}")
    kernel.code.append(
        Instruction(
            tuple(found[3].split(".")), _split(found[4]), found[2] or "", bool(found[1]), line
        )
    )


def _body(kernel: Kernel, text: str, files: dict[str, str]) -> None:
    line = ""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(\.loc[^\n]*)", r"\1;", text)  # the only statement without a semicolon
    for statement in re.sub(r"\s+", " ", text).split(";"):
        statement = statement.strip()
        while True:
            if found := re.match(r"(\$\w+): ?", statement):
                kernel.labels[found[1]] = len(kernel.code)
                statement = statement[found.end() :]
            elif statement[:1] in ("{", "}"):
                statement = statement[1:].strip()
            else:
                break
        if found := re.match(r"\.loc (\d+) (\d+)(?:.*inlined_at (\d+) (\d+))?", statement):
            # What stands in CUDA's own headers is named after the line that calls it.
            for number, at in ((found[1], found[2]), (found[3], found[4])):
                if number in files:
                    line = f"{files[number]}:{at}"
                    break
        elif statement:
            _statement(kernel, statement, line)


def parse(text: str) -> dict[str, Kernel]:
    """Kernels by their mangled names.

    Raises:
        ValueError: a statement that is not understood.
    """
    named = re.findall(r'\.file\s+(\d+) "([^"]*/csrc/[^"]+)"', text)
    files = {number: Path(path).name for number, path in named}
    kernels = {}
    for found in re.finditer(r"\.entry (\w+)\((.*?)\)[^{]*\n\{\n(.*?)\n\}\n", text, re.S):
        kernel = kernels[found[1]] = Kernel(found[1])
        _params(kernel, found[2])
        _body(kernel, found[3], files)
    return kernels
