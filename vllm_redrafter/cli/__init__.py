# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-redrafter`: one module per subcommand, imported only when it is asked for.

A command module has `add_arguments(parser)` and `run(args) -> int` (the exit code).
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from vllm_redrafter import __version__

COMMANDS = {
    "demo": "plain vLLM and ReDrafter side by side on a small real model",
    "bench": "compare speeds with any target and drafter on this machine, and recommend a flag",
    "data": "let the target answer prompts: the data that a drafter is trained on",
    "train": "train a drafter on the target's own answers",
    "eval": "replay recorded answers with a drafter: acceptance and predicted speed by setting",
    "show": "what is drafted and accepted for one prompt, step by step, as trees",
    "calibrate": "measure what steps and drafts cost here, for the node budget",
    "convert": "rewrite pickled or differently named drafter weights as safetensors",
    "doctor": "check this installation and say what to do",
}


class UserError(Exception):
    """Something the user can mend; the message is one sentence that says how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return _run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        prog="vllm-redrafter",
        description="ReDrafter speculative decoding for vLLM.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {n:<9} {text}" for n, text in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="see below")
    parser.parse_args(argv)
    return 2  # not reached: parse_args left, or argv[0] was a command


def _run(command: str, argv: list[str]) -> int:
    module = importlib.import_module(f"vllm_redrafter.cli.{command}")
    parser = argparse.ArgumentParser(
        prog=f"vllm-redrafter {command}",
        description=COMMANDS[command],
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return module.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was downloaded or converted completely is kept", file=sys.stderr)
        return 130
