# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter calibrate`: the cost table of the node budget, as a file.

An engine measures its own costs when it starts for the first time. A file is for machines that are
busy then, and for looking at.
"""

import argparse
import json
import os
from pathlib import Path

from vllm_redrafter.cli import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("target", help="the model that will be served")
    parser.add_argument("drafter", help="its drafter's directory")
    parser.add_argument("--out", type=Path, required=True, help="the file, JSON")
    parser.add_argument("--dtype", default="auto", help="as for vLLM (default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=64,
                        help="requests that will run at once (default: %(default)s)")  # fmt: skip
    parser.add_argument("--compile", action="store_true",
                        help="measure with torch.compile, as `vllm serve` runs by default; without "
                        "it as with --enforce-eager")  # fmt: skip
    parser.epilog = (
        'Use it with \'{"method": "redrafter", "model": "DRAFTER", "cost_table": "FILE"}\'; set '
        "OMP_NUM_THREADS as the server will have it."
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write; returns the exit code."""
    # The engine runs in this process, so that its errors are ours.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError("calibrate needs vLLM: run `vllm-redrafter doctor`.") from error
    from vllm_redrafter.drafter.config import DrafterError
    from vllm_redrafter.options import OptionError

    try:
        llm = LLM(
            model=args.target,
            dtype=args.dtype,
            enforce_eager=not args.compile,
            max_num_seqs=args.max_num_seqs,
            max_model_len=2048,
            speculative_config={"method": "redrafter", "model": args.drafter},
        )
    except (DrafterError, OptionError, OSError, ValueError) as error:
        raise UserError(str(error)) from error
    [table, *_] = llm.collective_rpc("redrafter_measure")
    args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for rows, seconds in table["rows_seconds"]:
        print(f"{rows:4g} rows of the target: {1e3 * seconds:8.2f} ms")
    for shape, points in table["draft_seconds"].items():
        times = ", ".join(f"batch {batch:g}: {1e3 * seconds:.2f} ms" for batch, seconds in points)
        print(f"draft W,L {shape}: {times}")
    print(f"wrote {args.out}")
    return 0
