# SPDX-License-Identifier: Apache-2.0
"""What every case may cost, counted: budgets.json beside this file.

    PYTHONPATH=.:tests/ops python -m ptx.budgets            # show what is counted now
    PYTHONPATH=.:tests/ops python -m ptx.budgets --write    # make it the budget

Counts are of nvcc's PTX for sm_90: warp instructions, sectors of global memory and wavefronts of
shared memory, all launches of a case together, a GPU of four multiprocessors assumed.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

FILE = Path(__file__).with_name("budgets.json")
COUNTED = ("sectors of loads", "sectors of stores", "shared wavefronts",
           "shared without conflicts", "barriers", "products", "local accesses")  # fmt: skip
# Another nvcc of the same release must not fail; a loop that got longer does.
ROOM = 1.02


def short(mangled: str) -> str:
    """``tree_attention_mma<bfloat16, 128>`` of a mangled name."""
    found = re.match(r"_ZN9redrafter4cuda(\d+)", mangled)
    rest = mangled[found.end() :]
    name, rest = rest[: int(found[1])], rest[int(found[1]) :]
    given = re.match(r"I(13__nv_bfloat16|6__half|f)?(?:Li(\d+)E)?(?:Lb([01])E)?E", rest)
    if not given:
        return name
    types = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
    parts = [part for part in (types.get(given[1]), given[2], given[3]) if part]
    return f"{name}<{', '.join(parts)}>"


def measured(name: str) -> dict[str, dict[str, int]]:
    """Kernel -> counts, of one case; its results are checked on the way."""
    from .cases import CASES
    from .operators import PtxOperators

    source, case = CASES[name]
    operators = PtxOperators(source, measure=True)
    case(operators)
    found: dict[str, Counter] = defaultdict(Counter)
    for kernel, counts in operators.counts:
        row = found[short(kernel)]
        row["launches"] += 1
        row["warp instructions"] += counts.instructions()
        row["most of a block"] = max(row["most of a block"], counts.most_of_a_block)
        row.update({key: counts.other[key] for key in COUNTED if counts.other[key]})
    return {kernel: dict(row) for kernel, row in found.items()}


def exceeded(found: dict[str, dict[str, int]], budget: dict[str, dict[str, int]]) -> list[str]:
    """Sentences; a kernel or a count without a budget has one of zero."""
    return [
        f"{kernel}: {count} {what}, the budget is {budget.get(kernel, {}).get(what, 0)}"
        for kernel, row in found.items()
        for what, count in row.items()
        if count > budget.get(kernel, {}).get(what, 0) * ROOM
    ]


def main() -> None:
    from vllm_redrafter.ops.library import compiled_available

    from .cases import CASES

    assert compiled_available()
    found = {name: measured(name) for name in CASES}
    text = json.dumps(found, indent=1) + "\n"
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
