# SPDX-License-Identifier: Apache-2.0
"""Random requests on random engines: is every answer plain vLLM's?

    PYTHONPATH=tests python -m sweep --requests 10000

Prints what it has seen after every engine; a difference is made small and printed as JSON, which
``--replay FILE`` runs again. Ends with 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import environment

environment.set_defaults()


def main() -> int:
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-engine", type=int, default=100, help="requests for every engine")
    parser.add_argument("--replay", type=Path, help="run the case of this file instead")
    args = parser.parse_args()

    from engine_v1.tiny_target import tiny_drafter, write_target

    from sweep.run import Sweep
    from sweep.shrink import shrink
    from sweep.space import random_case, random_settings
    from vllm_redrafter.drafter.checkpoint import save_drafter
    from vllm_redrafter.plugin import register

    register()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        save_drafter(tiny_drafter(), root / "drafter")
        sweep = Sweep(write_target(root / "target"), root / "drafter")
        if args.replay:
            for finding in sweep.run(json.loads(args.replay.read_text())):
                print(finding)
            return int(bool(sweep.totals.faults))
        source = random.Random(args.seed)
        while sweep.totals.requests < args.requests:
            settings = random_settings(source)
            for _ in range(4):
                sweep.run(random_case(source, settings, args.per_engine // 4))
            print(sweep.totals, flush=True)
        for case, finding in sweep.totals.faults[:5]:
            print(finding.what)
            print(json.dumps(shrink(case, sweep.fails)), flush=True)
        return int(bool(sweep.totals.faults))


if __name__ == "__main__":
    sys.exit(main())
