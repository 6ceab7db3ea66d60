# SPDX-License-Identifier: Apache-2.0
"""Write down what a wheel of vLLM says about every hook, for tests/contract.

Once per version and whenever the hook table grows, on a machine with a package index:

    pip download vllm==0.33.0 --no-deps --only-binary :all: --platform manylinux_2_28_x86_64
    python -m zipfile -e vllm-0.33.0-*.whl DIR
    python scripts/extract_vllm.py DIR --wheel vllm-0.33.0-*.whl

Nothing of the wheel is imported, so it may be the CUDA build on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_redrafter.engine.compat import HOOKS
from vllm_redrafter.engine.vllm_source import VllmSource

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "contract" / "extracts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with vllm/__init__.py in it")
    parser.add_argument(
        "--wheel", type=Path, required=True, help="the wheel; only its name is used"
    )
    args = parser.parse_args()
    source = VllmSource(args.source)
    version = source.version()
    problems = [(hook.where, problem) for hook in HOOKS if (problem := source.check(hook))]
    for where, problem in problems:
        print(f"{where} {problem}")
    if problems:
        raise SystemExit(f"vLLM {version} does not fit; nothing was written.")
    extract = {"version": version, "wheel": args.wheel.name, "hooks": source.extract(HOOKS)}
    path = FOLDER / f"vllm-{version}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(extract, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(HOOKS)} hooks")


if __name__ == "__main__":
    main()
