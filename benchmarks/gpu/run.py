# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command that can be run again to go on.

    python benchmarks/gpu/run.py --out DIR [--vllm FOLDER] [--stages check tests] [--minutes 25]
    python benchmarks/gpu/run.py --out DIR --rehearse      # tiny models on the CPU

Every stage runs in a process of its own with a limit of its own. What is finished is kept in DIR
and skipped the next time; what failed, or was cut short, is tried again. DIR/gpu_run.json,
gpu_run.md and gpu_run.png hold whatever there is; the rest says "not run". See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from stages import STAGES, Context, StageFailed  # noqa: E402
from summary import write_summary  # noqa: E402

ENTRY_POINTS = "[vllm.general_plugins]\nredrafter = vllm_redrafter.plugin:register\n"
# A stage that is given less time than this is left for the next run.
LEAST_SECONDS = 30.0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    context = Context(args.out.resolve(), args.rehearse, tuple(args.tree), args.accepted)
    if args.inside:
        return run_inside(context, args.inside)
    context.out.mkdir(parents=True, exist_ok=True)
    env = environment(args, context)
    here = describe(args, env)
    state = load_state(context.out, here)
    deadline = time.monotonic() + 60 * args.minutes
    for name in args.stages:
        before = state["stages"].get(name, {})
        if before.get("status") == "done":
            print(f"{name}: done already", flush=True)
            continue
        # A rehearsal says nothing about time, and may run on a busy machine.
        limit = args.minutes if args.rehearse else STAGES[name].minutes
        seconds = min(60 * limit, deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            state["stages"][name] = {"status": "not run", "why": "the time was up; run it again"}
        else:
            state["stages"][name] = start(name, seconds, args, context, env)
        save_state(context.out, state)
        print(f"{name}: {json.dumps(state['stages'][name])}", flush=True)
    write_summary(context.out, state, list(STAGES))
    print((context.out / "gpu_run.md").read_text())
    return int(any(state["stages"][name]["status"] != "done" for name in args.stages))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--out", type=Path, required=True, help="folder of the results")
    made.add_argument("--vllm", type=Path, help="folder that a vLLM was unpacked into")
    made.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    made.add_argument("--minutes", type=float, default=25.0, help="for this run (%(default)s)")
    made.add_argument(
        "--tree", type=int, nargs=3, metavar=("W", "L", "N"),
        help="of the synthetic stages (8 5 32)",
    )  # fmt: skip
    made.add_argument(
        "--accepted",
        type=float,
        help="accepted nodes a step that they are given (3.2)",
    )
    made.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    made.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)
    return made


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the defaults that depend on --rehearse."""
    args = parser().parse_args(argv)
    args.tree = args.tree or ([4, 3, 7] if args.rehearse else [8, 5, 32])
    if args.accepted is None:
        args.accepted = 1.5 if args.rehearse else 3.2
    return args


def environment(args: argparse.Namespace, context: Context) -> dict[str, str]:
    """Of the stages: where vLLM and this package are, and what an offline machine needs."""
    path = [str(ROOT), str(args.vllm.resolve()) if args.vllm else ""]
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="redrafter"):
        # A checkout that is not installed: vLLM finds plugins by metadata only.
        info = context.out / "site" / "vllm_redrafter_checkout-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Name: vllm-redrafter-checkout\nVersion: 0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        path.append(str(info.parent))
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if context.rehearse:
        path.append(str(ROOT / "tests" / "engine_v2" / "harness"))
        env |= {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    else:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    path.append(os.environ.get("PYTHONPATH", ""))
    return os.environ | env | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def describe(args: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """What the results depend on: when it changes, nothing that was measured before counts."""
    code = (
        "import json, torch, vllm, vllm_redrafter;"
        "gpu = torch.cuda.is_available();"
        "print(json.dumps({'device': torch.cuda.get_device_name() if gpu else '',"
        "'torch': torch.__version__, 'cuda': str(torch.version.cuda),"
        "'vllm': vllm.__version__, 'vllm-redrafter': vllm_redrafter.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise SystemExit(f"torch, vLLM or this package cannot be imported: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if args.rehearse:
        found["device"] = "CPU (rehearsal)"
    elif not found["device"]:
        raise SystemExit("there is no CUDA device; --rehearse runs tiny models on the CPU")
    return {**found, "tree": args.tree, "accepted": args.accepted}


# -- one stage -----------------------------------------------------------------------------------


def start(
    name: str, seconds: float, args: argparse.Namespace, context: Context, env: dict[str, str]
) -> dict[str, Any]:
    """Run a stage in a process group, which is killed when its time is up."""
    command = [sys.executable, str(HERE / "run.py"), "--out", str(context.out), "--inside", name]
    command += ["--tree", *map(str, args.tree), "--accepted", str(args.accepted)]
    command += ["--rehearse"] if args.rehearse else []
    log, began = context.out / f"{name}.log", time.monotonic()
    with open(log, "w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            command, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            # Asked first: engines are in sessions of their own, and the stage stops them.
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(timeout=15)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    spent = round(time.monotonic() - began, 1)
    if code is None:
        why = f"cut short after {spent:.0f} s; run it again to go on"
        return {"status": "failed", "seconds": spent, "why": why}
    failure = context.out / f"{name}.failed"
    if code or not (context.out / f"{name}.json").is_file():
        why = failure.read_text() if failure.is_file() else f"ended with {code}: see {log.name}"
        return {"status": "failed", "seconds": spent, "why": why}
    return {"status": "done", "seconds": spent}


def run_inside(context: Context, name: str) -> int:
    """The process of one stage: its result or the reason for its failure becomes a file."""
    result, failure = (context.out / f"{name}.{end}" for end in ("json", "failed"))
    for path in (result, failure):
        path.unlink(missing_ok=True)
    try:
        found = STAGES[name].run(context)
    except StageFailed as error:
        failure.write_text(str(error))
        return 1
    write(result, json.dumps(found, indent=1) + "\n")
    return 0


# -- state ---------------------------------------------------------------------------------------


def load_state(out: Path, here: dict[str, Any]) -> dict[str, Any]:
    path = out / "state.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    if state.get("environment") != here:
        state = {"environment": here, "stages": {}}
    return state


def save_state(out: Path, state: dict[str, Any]) -> None:
    write(out / "state.json", json.dumps(state, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted run must not leave half a result."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
