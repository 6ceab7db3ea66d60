# SPDX-License-Identifier: Apache-2.0
"""Write docs/benchmarks.md from benchmarks/results: no figure is typed by hand.

python scripts/docs/benchmarks.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
sys.path.insert(0, str(ROOT))
# Files of `vllm-redrafter bench`, and older ones of the script that it replaced.
RESULTS = ("bench", "load")

INTRODUCTION = """# Benchmarks

Made by `python scripts/docs/benchmarks.py` from the files of `vllm-redrafter bench` in
`benchmarks/results/`. They were made on different machines and with different states of the code;
compare inside one table only.
"""


def page() -> str:
    """The page's text."""
    from vllm_redrafter.bench.markdown import markdown

    parts = [INTRODUCTION]
    results = ROOT / "benchmarks" / "results"
    for path in (p for folder in RESULTS for p in sorted((results / folder).glob("*.json"))):
        text = markdown(json.loads(path.read_text(encoding="utf-8")))
        parts.append(
            f"## {path.stem}\n\n**{text.removeprefix('# ').replace(chr(10), '**' + chr(10), 1)}"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
