# SPDX-License-Identifier: Apache-2.0
"""Write docs/support.md from the tables that the tests run.

python scripts/docs/support.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "support.md"
sys.path.insert(0, str(ROOT / "tests"))


def _drafted(shape: str) -> str:
    """Of a parameter: all answers are exact, whatever is drafted."""
    return {"tree": "exact, tree", "chain": "exact, chain"}.get(shape, f"exact, {shape}")


def page() -> str:
    """The page's text."""
    sys.path.insert(0, str(ROOT / "tests" / "engine_cases"))
    from settings import CACHE, SCHEDULER, SPECULATIVE
    from support_table import KINDS, PARAMETERS, TARGETS

    from vllm_redrafter.engine.compat import TESTED_VLLM

    lines = [INTRODUCTION]
    lines += [
        f"| {v} | {', '.join(r.upper() for r in runners)} |" for v, runners in TESTED_VLLM.items()
    ]
    lines += [INTRODUCTION_OF_TARGETS]
    lines += [
        f"| {name} | {row.cpu} | {row.cuda} | {row.compared or 'no'} |"
        for name, row in TARGETS.items()
    ]
    lines += [INTRODUCTION_OF_PARAMETERS]
    lines += [
        f"| `{name}` | {_drafted(row.v1)} | {_drafted(row.v2)} |"
        for name, row in PARAMETERS.items()
    ]
    lines += [INTRODUCTION_OF_KINDS]
    lines += [
        f"| {name} | {_drafted(row.v1)} | {_drafted(row.v2)} | {row.held_by} |"
        for name, row in KINDS.items()
    ]
    lines += [INTRODUCTION_OF_SETTINGS]
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

INTRODUCTION_OF_TARGETS = """
V2 has not been run on a GPU: its logic is tested on CPUs, under Triton's interpreter.

## Targets

From `tests/engine_cases/support_table.py`, with vLLM 0.32.0; `engine_errors/test_target_shape.py`
holds every cell. *Tree*: the whole draft is verified. *Chain*: its best path, as vLLM verifies its
own drafts. *Refused*: the engine does not start, and says why. The start-up line and
`vllm-redrafter doctor --target DIR` say which of them a target gets, and why. Compared: answers of
tiny random models were equal to plain vLLM's, token for token, with accepted drafts.

| `model_type` | V1, on CPUs | V2, on GPUs | compared on |
| --- | --- | --- | --- |"""

INTRODUCTION_OF_PARAMETERS = """
The rest is in [Limits](limits.md).

## Parameters of requests

From the same file; `engine_v1/test_support.py` and `engine_v2/own_process/v2_support.py` ask the
engines for all of them at once, compare the answers with plain vLLM's and look at what was
verified. On targets that get chains every tree is a chain. The tree for `structured_outputs` on V1
takes a worker in the scheduler's process, which `vllm serve` on a CPU does not have: there it is a
chain (see [Limits](limits.md)).

| parameter | V1 | V2 |
| --- | --- | --- |"""

INTRODUCTION_OF_KINDS = """
| requests with | V1 | V2 | held by |
| --- | --- | --- | --- |"""

INTRODUCTION_OF_SETTINGS = """
## Settings of vLLM

From `tests/engine_cases/settings.py`, whose entries `engine_v1/test_settings.py` and
`engine_errors/test_every_setting.py` run on Model Runner V1; a setting that is new in
vLLM fails them."""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
