# SPDX-License-Identifier: Apache-2.0
"""Wrong kernels, to see whether a run notices: a barrier less, a bound off by one, a mask ignored.

    PYTHONPATH=.:tests/ops python -m ptx.mutate [EVERY]     # every n-th of each kind, 1: all

Bounds and masks are for reading: most of those that small cases do not notice make no difference
there (checks of inputs that are good, comparisons that the compiler adds for unrolled loops).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import machine
from .cases import CASES
from .machine import Counts
from .operators import PtxOperators
from .parse import Instruction, Kernel

NOTHING = Instruction(("mov", "pred"), ("%p99999", "%p99999"))
_OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
KINDS = ("barrier", "bound", "mask")


def mutant_of(instruction: Instruction) -> tuple[str, Instruction] | None:
    """(kind, the wrong instruction), if there is one."""
    parts, operands = instruction.parts, instruction.operands
    if parts[0] == "bar":
        return "barrier", NOTHING
    if parts[0] == "setp" and parts[1] in _OFF_BY_ONE and parts[2][0] in "su":
        return "bound", replace(instruction, parts=("setp", _OFF_BY_ONE[parts[1]], parts[2]))
    if parts[0] in ("and", "or") and parts[1] == "pred":
        return "mask", replace(instruction, parts=("mov", "pred"), operands=operands[:2])
    if parts[0] == "and":
        return "mask", replace(instruction, parts=("mov", parts[1]), operands=operands[:2])
    if parts[0] == "selp":
        kept = (operands[0], operands[1])
        return "mask", replace(instruction, parts=("mov", parts[1]), operands=kept)
    return None


def mutants(
    kernels: dict[str, Kernel], ran: list[tuple[str, Counts]]
) -> Iterator[tuple[str, Instruction, dict[str, Kernel]]]:
    """(kind, the instruction that was right, kernels with one wrong) for all that ``ran``."""
    issued: dict[str, Counts] = {}
    for name, counts in ran:
        if name in issued:
            issued[name].issued += counts.issued
        else:
            issued[name] = counts
    for name, counts in issued.items():
        kernel = kernels[name]
        for at, instruction in enumerate(kernel.code):
            found = mutant_of(instruction)
            if counts.issued[at] and found:
                code = [*kernel.code[:at], found[1], *kernel.code[at + 1 :]]
                yield found[0], instruction, kernels | {name: replace(kernel, code=code)}


def notices(source: str, case, kernels: dict[str, Kernel]) -> bool:
    """Whether the case fails with these kernels."""
    try:
        case(PtxOperators(source, kernels=kernels))
    except (AssertionError, RuntimeError, IndexError, NotImplementedError):
        return True
    return False


def survivors(name: str, kinds: tuple[str, ...], every: int) -> tuple[Counter, list[str]]:
    """(mutants by kind, those that the case does not notice), of every n-th one."""
    source, case = CASES[name]
    right = PtxOperators(source)
    case(right)
    longest = max(int(counts.issued.max()) for _, counts in right.counts)
    tried, left, before = Counter(), [], machine.MOST_STEPS
    machine.MOST_STEPS = 200 * longest + 20_000  # a loop without an end is noticed too
    try:
        wanted = [m for m in mutants(right.kernels, right.counts) if m[0] in kinds]
        for kind, instruction, kernels in wanted[::every]:
            tried[kind] += 1
            if not notices(source, case, kernels):
                left.append(f"{kind}: {instruction}")
    finally:
        machine.MOST_STEPS = before
    return tried, left


def main() -> None:
    from vllm_redrafter.ops.library import compiled_available

    assert compiled_available()
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    total, lost = Counter(), Counter()
    torch.set_num_threads(1)
    for name in CASES:
        tried, left = survivors(name, KINDS, every)
        total += tried
        lost += Counter(line.split(":")[0] for line in left)
        print(f"{name}: {sum(tried.values()) - len(left)} of {sum(tried.values())} noticed",
              flush=True)  # fmt: skip
        for line in left:
            print(f"    {line}", flush=True)
    for kind in KINDS:
        print(f"{kind}: {total[kind] - lost[kind]} of {total[kind]} noticed")


if __name__ == "__main__":
    main()
