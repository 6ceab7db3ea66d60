# SPDX-License-Identifier: Apache-2.0
"""A hostile crowd at plain `vllm serve` and at ReDrafter's, as long as you like.

    PYTHONPATH=tests python -m hostile --minutes 30 --out FILE.json

Every request goes to both servers; 1 % of ReDrafter's drafting calls fail on purpose. Ends with 1
if an answer differs (ties apart, by the rule of tests/sweep), a request hangs, or something is left
when the crowd has gone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import environment

environment.set_defaults()


def main() -> int:
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for what was seen")
    args = parser.parse_args()

    from hostile.servers import FAULTY_PERCENT, run
    from vllm_redrafter.plugin import register

    register()

    with tempfile.TemporaryDirectory() as directory:
        outcome = run(Path(directory), 60 * args.minutes, args.seed)
    report = outcome.report
    seen = {
        "minutes": args.minutes,
        "seed": args.seed,
        "faulty_percent": FAULTY_PERCENT,
        "requests": report.kinds.total(),
        "kinds": dict(report.kinds.most_common()),
        "statuses": dict(report.statuses),
        "answers_compared": report.compared,
        "tokens_compared": report.tokens,
        "differences": [list(map(str, one)) for one in report.differences],
        "ties": outcome.ties,
        "hung": report.hung,
        "left": outcome.left,
        "preemptions": outcome.preemptions,
        "draft_errors": outcome.stats["draft_errors"],
        "drafting_off": outcome.stats["drafting_off"],
        "acceptance_length": outcome.stats["acceptance_length"],
        "exit_codes": outcome.exit_codes,
        "orphans": outcome.orphans,
        "resident_mib": {
            name: [round(size / 2**20) for _, size in (samples[0], samples[-1])]
            for name, samples in zip(("plain", "redrafter"), report.memory, strict=True)
        },
        "resident_mib_per_minute": {
            name: round(report.growth(server) * 60 / 2**20, 3)
            for server, name in enumerate(("plain", "redrafter"))
        },
    }
    text = json.dumps(seen, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return int(bool(report.differences or report.hung or any(outcome.left.values())))


if __name__ == "__main__":
    sys.exit(main())
