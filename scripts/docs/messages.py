# SPDX-License-Identifier: Apache-2.0
"""Write docs/messages.md: every sentence that the package raises, read off its source.

    python scripts/docs/messages.py

Most sentences hold their own cure. Those that do not have one in messages_cures.py, and a sentence
without a cure in either place ends this script.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_redrafter"
PAGE = ROOT / "docs" / "messages.md"

# Errors that reach a user; `missing` makes a TrainingError about a package that is not installed.
NAMES = (
    "BadTree", "BenchError", "CheckFailed", "CostTableError", "DrafterError", "EngineFailed",
    "FetchError", "OptionError", "RuntimeError", "SourceError", "TrainingError",
    "UnsupportedError", "UserError", "ValueError", "missing",
)  # fmt: skip
GROUPS = {
    "Options and the engine's settings": ("options.py", "engine"),
    "Drafters": ("drafter",),
    "Making data, training, evaluating": ("training",),
    "Commands": ("cli",),
    "Demo, benchmarks and downloads": ("demo", "bench"),
    "Cost tables": ("budget",),
    "Functions and operators": ("tree", "lookup", "ops", "reading.py"),
}


@dataclass(frozen=True)
class Message:
    """Attributes: file below the package, name of the error, text with ``...`` for values."""

    file: str
    error: str
    text: str


def text_of(node: ast.AST) -> str | None:
    """The text of a literal, values as ``...``; None for what is computed elsewhere."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join("..." if isinstance(p, ast.FormattedValue) else p.value for p in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (text_of(left) or "...") + (text_of(right) or "...")
        case ast.IfExp(body=body):
            return text_of(body)
    return None


def messages_in(source: str, file: str) -> Iterator[Message]:
    """Of every ``raise NAME(text)`` in a source."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        error = ast.unparse(node.exc.func).split(".")[-1]
        parts = [text_of(argument) for argument in node.exc.args]
        if error in NAMES and parts and all(part is not None for part in parts):
            text = ": ".join(" ".join(part.split()) for part in parts)
            yield Message(file, error, text)


def all_messages() -> list[Message]:
    """In the order of files and lines, equal ones once."""
    found: dict[tuple[str, str], Message] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for message in messages_in(path.read_text(encoding="utf-8"), file):
            found.setdefault((message.text, file.split("/")[0]), message)
    return list(found.values())


def cure_of(text: str, cures: dict[str, str]) -> str | None:
    """Ours where there is one, else what the sentence itself says behind its last mark."""
    if text in cures:
        return cures[text]
    for mark in ("; ", ": "):
        head, found, tail = text.rpartition(mark)
        if found and " " in tail and len(tail.replace("...", "").split()) > 1:
            return tail[0].upper() + tail[1:] + ("" if tail.endswith(".") else ".")
    return None


def page() -> str:
    """The page's text."""
    from messages_cures import CURES

    lines = [INTRODUCTION]
    unknown, used = [], set()
    everything = all_messages()
    for title, places in GROUPS.items():
        lines += [f"\n## {title}\n", "| message | raised as | what to do |", "| --- | --- | --- |"]
        for message in everything:
            if message.file.split("/")[0] not in places:
                continue
            cure = cure_of(message.text, CURES)
            if cure is None:
                unknown.append(message)
                continue
            used |= {message.text} & set(CURES)
            cells = (f"`{message.text.replace('`', chr(39))}`", message.error, cure)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if unknown:
        raise SystemExit("no cure:\n" + "\n".join(f"{m.file}: {m.text}" for m in unknown))
    if stale := set(CURES) - used:
        raise SystemExit("cures of no message:\n" + "\n".join(sorted(stale)))
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Every message

Made by `python scripts/docs/messages.py` from the source; `...` stands for a value. Search this
page for a few words of what you read. Kinds of failure: [failures.md](failures.md).
Sentences that begin in the middle stand in brackets or after a file's name in another
message. A message that is another program's, passed on as it is (vLLM's, pip's,
torch's), is not here."""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
