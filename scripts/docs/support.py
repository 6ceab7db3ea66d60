# SPDX-License-Identifier: Apache-2.0
"""Write docs/support.md from the tables that the tests run.

python scripts/docs/support.py
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "support.md"
sys.path.insert(0, str(ROOT / "tests"))


def literal_keys(path: str, name: str) -> list[str]:
    """The keys of a dictionary in a test's source, which is not imported: it needs vLLM."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return [ast.literal_eval(key) for key in node.value.keys]
    raise SystemExit(f"{path} has no {name}")


def page() -> str:
    """The page's text."""
    sys.path.insert(0, str(ROOT / "tests" / "engine_cases"))
    from settings import CACHE, SCHEDULER, SPECULATIVE

    from vllm_redrafter.engine.compat import TESTED_VLLM

    lines = [INTRODUCTION]
    lines += [
        f"| {v} | {', '.join(r.upper() for r in runners)} |" for v, runners in TESTED_VLLM.items()
    ]
    windows = literal_keys("tests/engine_cases/windows.py", "FAMILIES")
    scaled = literal_keys("tests/engine_cases/targets.py", "SCALED")
    lines += [TARGETS.format(windows=", ".join(windows), scaled=", ".join(scaled))]
    for title, table in (
        ("Scheduler", SCHEDULER),
        ("Cache", CACHE),
        ("speculative_config", SPECULATIVE),
    ):
        lines += [f"\n### {title}\n", "| setting | what |", "| --- | --- |"]
        for field, entry in table.items():
            what = {
                "Works": lambda e: f"works; tried with `{e.value}`",
                "Refused": lambda e: f'refused: "{e.message}"',
                "NotTried": lambda e: f"not tried: {e.why}",
            }[type(entry).__name__](entry)
            lines.append(f"| `{field}` | {what} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# What is supported

Made by `python scripts/docs/support.py` from `TESTED_VLLM` in
`vllm_redrafter/engine/compat.py` and from the tests' own tables.

## vLLM

| version | model runners an engine was run with |
| --- | --- |"""

TARGETS = """
V2 has not been run on a GPU: its logic is tested on CPUs, under Triton's interpreter.

## Targets

Compared with plain vLLM on tiny random models, float32.

* Sliding windows or sinks, on V1: {windows}. On V2: mistral, gemma2 (`v2_windows.py`).
* Scaled embeddings or logits, on V1 and V2: {scaled}.

The rest is in the README's [limits](../README.md#limits).

## Settings of vLLM

From `tests/engine_cases/settings.py`, whose entries `engine_v1/test_settings.py` and
`engine_errors/test_every_setting.py` run on Model Runner V1; a setting that is new in
vLLM fails them."""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
