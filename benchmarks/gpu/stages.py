# SPDX-License-Identifier: Apache-2.0
"""The stages of the GPU run; each is started by ``run.py`` in a process of its own.

A stage takes a ``Context``, returns plain values, and raises ``StageFailed`` with one sentence
where it cannot. Whatever it starts inherits its environment, an unpacked vLLM on
PYTHONPATH too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class StageFailed(RuntimeError):
    """A stage that cannot be finished; the message says why."""


@dataclass(frozen=True)
class Context:
    """What every stage is told.

    Attributes:
        out: folder of the results.
        rehearse: tiny models on the CPU; figures mean nothing.
        tree: beam width, draft length, nodes of the synthetic stages.
        accepted: accepted nodes per step that they are given.
    """

    out: Path
    rehearse: bool
    tree: tuple[int, int, int]
    accepted: float

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


# -- the library and its tests -------------------------------------------------------------------


def check(context: Context) -> dict[str, Any]:
    """Build the operators if they are missing, and ask every part for its version."""
    if not _kernel(context)["kernel"] and not context.rehearse:
        if not shutil.which("nvcc"):
            raise StageFailed(
                "vllm_redrafter/_ops.so has no CUDA kernels and there is no nvcc; bring a library "
                "that was built with VLLM_REDRAFTER_CUDA=1."
            )
        env = os.environ | {"VLLM_REDRAFTER_CUDA": "1", "VLLM_REDRAFTER_BUILD_OPS": "1"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if built.returncode:
            raise StageFailed(f"the operators do not build: {last_line(built.stderr)}")
    found = _kernel(context)
    if not found["kernel"]:
        raise StageFailed(f"the operators cannot run on {context.device}: {found['why']}.")
    doctor = [sys.executable, "-m", "vllm_redrafter.cli", "doctor", "--source", _vllm_folder()]
    verdict = subprocess.run(doctor, capture_output=True, text=True)
    if verdict.returncode:
        raise StageFailed(f"this vLLM does not fit: {verdict.stdout.strip()}")
    return {**found, "doctor": verdict.stdout.strip().splitlines()}


KERNEL = """
import json, torch
from vllm_redrafter import ops
from vllm_redrafter.ops.library import has_kernel, why_not
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.tree import Tree
device = torch.device({device!r})
found = {{"kernel": has_kernel(device), "why": why_not(), "cuda": ops.cuda_architectures()}}
if found["kernel"]:
    # One call, so that a library for another GPU fails here and not in the middle of a run.
    tree = Tree.from_lists([[5, 7, 8]], [[-1, 0, 0]])
    tree = Tree(**{{name: value.to(device) for name, value in vars(tree).items()}})
    found["walk"] = walk(tree, torch.tensor([[8, 0, 3]], device=device)).next_token.tolist()
    assert found["walk"] == [3], found["walk"]
print(json.dumps(found))
"""


def _kernel(context: Context) -> dict[str, Any]:
    code = KERNEL.format(device=context.device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise StageFailed(f"the operators fail on {context.device}: {last_line(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _vllm_folder() -> str:
    from vllm_redrafter.engine.vllm_source import installed

    return str(installed().root)


def tests(context: Context) -> dict[str, Any]:
    """The tests that need a GPU; a rehearsal runs one small file instead."""
    report = context.out / "tests.xml"
    chosen = ["tests/unit/test_walk_greedy.py"] if context.rehearse else ["-m", "gpu", "tests/ops"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True
    )
    if not report.is_file():
        raise StageFailed(f"pytest did not run: {last_line(done.stdout + done.stderr)}")
    bad, skipped, passed = [], [], 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problems = [node for node in case if node.tag in ("failure", "error", "skipped")]
        passed += not problems
        for node in problems:
            # A package that is not there (xformers) is no failure, but it is said.
            kept = skipped if node.tag == "skipped" else bad
            kept.append(f"{case.get('classname')}.{case.get('name')}: {node.get('message')}")
    if bad or not passed:
        first = f"; first: {bad[0].splitlines()[0]}" if bad else ""
        raise StageFailed(f"{passed} tests passed, {len(bad)} did not{first}.")
    return {"passed": passed, "skipped": skipped}


# -- real weights --------------------------------------------------------------------------------


def real_pair(context: Context) -> tuple[Path, Path, list[list[int]], dict[str, Any]]:
    """Target, drafter, prompts, and what the engines need on this device."""
    if not context.rehearse:
        from vllm_redrafter.cli.demo import BUNDLED_DRAFTER
        from vllm_redrafter.demo.prompts import chat_token_ids, mt_bench, spread
        from vllm_redrafter.demo.target import smollm2

        target = smollm2()
        prompts = chat_token_ids(spread(mt_bench(), 16), target)
        # Several engines share the GPU; each one's cache is of a given size.
        return target, BUNDLED_DRAFTER, prompts, {"gpu_memory_utilization": 0.2}
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import VOCAB, write_fitted_drafter, write_llama

    folder = context.out / "models"
    target, drafter = folder / "real", folder / "real-drafter"
    if not (drafter / "config.json").is_file():
        write_llama(target)
        write_fitted_drafter(drafter, target, steps=100)
    source = random.Random(0)
    prompts = [[source.randrange(VOCAB - 64) for _ in range(12)] for _ in range(4)]
    return target, drafter, prompts, {"block_size": 32, "num_gpu_blocks_override": 64}


def lossless(context: Context) -> dict[str, Any]:
    """Greedy outputs beside plain vLLM's, and plain vLLM's beside its own at batch 1."""
    from vllm_redrafter.bench.compare import Settings, compare
    from vllm_redrafter.bench.engine_process import EngineFailed

    target, drafter, prompts, kwargs = real_pair(context)
    variants = {"plain": None, "redrafter": {"method": "redrafter", "model": str(drafter)}}
    out: dict[str, Any] = {}
    for dtype in ("float32",) if context.rehearse else ("float32", "bfloat16"):
        settings = Settings(
            dtype=dtype,
            batch_size=2 if context.rehearse else 8,
            max_tokens=16 if context.rehearse else 128,
            rounds=1,
            max_model_len=256 if context.rehearse else 2048,
            kv_cache_bytes=16 << 20 if context.rehearse else 2 << 30,
            llm_kwargs=kwargs,
        )
        try:
            result = compare(target, variants, prompts, settings, other_batch_size=1)
        except EngineFailed as error:
            # FlashAttention has no float32, and trees need it: the reason is the result.
            out[dtype] = {"not_run": last_line(str(error))}
            continue
        itself = result.self_equality()
        assert itself is not None
        out[dtype] = {
            "redrafter": dataclasses.asdict(result.equality("redrafter")),
            "plain at batch 1": dataclasses.asdict(itself),
            "acceptance_length": result.summary("redrafter").acceptance_length,
        }
    ran = {dtype: row for dtype, row in out.items() if "not_run" not in row}
    if not ran:
        raise StageFailed(f"no dtype could be compared: {out}.")
    exact = ran.get("float32")
    if exact and exact["redrafter"]["equal"] != exact["redrafter"]["total"]:
        raise StageFailed(f"float32 outputs differ from plain vLLM's: {exact['redrafter']}.")
    return out


def smollm2(context: Context) -> dict[str, Any]:
    """Tokens/s with the real drafter, engines in turn: the only end-to-end speed."""
    from vllm_redrafter.bench.compare import Settings, compare

    target, drafter, prompts, kwargs = real_pair(context)
    ours = {"method": "redrafter", "model": str(drafter)}
    variants: dict[str, Any] = {"plain": None, "tree": ours}
    if not context.rehearse:
        variants["chain"] = {**ours, "beam_width": 1, "draft_length": 3}
    out: dict[str, Any] = {}
    for batch in (2,) if context.rehearse else (1, 8):
        settings = Settings(
            dtype="float32" if context.rehearse else "bfloat16",
            batch_size=batch,
            max_tokens=16 if context.rehearse else 128,
            rounds=1 if context.rehearse else 3,
            max_model_len=256 if context.rehearse else 2048,
            kv_cache_bytes=16 << 20 if context.rehearse else 2 << 30,
            enforce_eager=context.rehearse,
            llm_kwargs=kwargs,
        )
        result = compare(target, variants, prompts, settings)
        summaries = {name: result.summary(name) for name in variants}
        out[str(batch)] = {
            name: {
                "tokens_per_second": summary.tokens_per_second,
                "acceptance_length": summary.acceptance_length,
                "ms_per_step": summary.ms_per_step,
                "ratio": None if name == "plain" else dataclasses.asdict(result.ratio(name)),
            }
            for name, summary in summaries.items()
        }
    return out


# -- shapes, dummy weights, synthetic acceptance ---------------------------------------------------


def shape(name: str) -> Callable[[Context], dict[str, Any]]:
    """The stage that measures one shape: plain, chain and tree at several batch sizes."""

    def stage(context: Context) -> dict[str, Any]:
        from shapes import write_drafter, write_target

        from vllm_redrafter.drafter.config import DrafterError

        name_here = "tiny" if context.rehearse else name
        models = context.out / "models"
        target = write_target(name_here, models)
        try:
            drafter = write_drafter(name_here, models)
        except DrafterError as error:
            raise StageFailed(f"remove what an interrupted run left: {error}") from error
        job = make_job(context, target, drafter)
        modes = job.pop("modes")
        # Memory of an engine is only surely free when its process is gone.
        groups = [modes] if context.rehearse else [{mode: modes[mode]} for mode in modes]
        rows = []
        for group in groups:
            rows += decode(context, name, "-".join(group), {**job, "modes": group})
        return {"rows": rows, "accepted_given": context.accepted, "tree": list(context.tree)}

    return stage


def make_job(context: Context, target: Path, drafter: Path) -> dict[str, Any]:
    """See ``decode.py``."""
    from synthetic import CHILD_RANKS, rates_for

    width, length, nodes = context.tree
    batches = [1, 2] if context.rehearse else [1, 4, 8, 16, 32, 64]

    def spec(width: int, length: int, nodes: int) -> dict[str, Any]:
        options = {"beam_width": width, "draft_length": length, "num_speculative_tokens": nodes}
        return {"method": "redrafter", "model": str(drafter), **options}

    llm: dict[str, Any] = {
        "model": str(target),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "seed": 0,
        "max_num_seqs": max(batches),
    }
    if context.rehearse:
        llm |= {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_batched_tokens": 256,
            "enforce_eager": True,
            "block_size": 32,
            "num_gpu_blocks_override": 64,
            "kv_cache_memory_bytes": 16 << 20,
        }
    else:
        rows = sorted({batch * (1 + n) for batch in batches for n in (0, length, nodes)})
        llm |= {
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": 0.9,
            # vLLM's own sizes end at 512 rows, which 16 trees exceed.
            "compilation_config": {"cudagraph_capture_sizes": rows},
        }
    return {
        "cuda": not context.rehearse,
        "llm": llm,
        "modes": {
            "plain": None,
            "chain": spec(1, length, length),
            "tree": spec(width, length, nodes),
        },
        # 64 requests of 2,048 tokens do not fit beside a 7B model with as many KV heads as heads.
        "points": [
            [batch, 24 if context.rehearse else 2048 if batch <= 16 else 768] for batch in batches
        ],
        "steps": 12 if context.rehearse else 64,
        "rates": rates_for(context.accepted, length),
        "ranks": list(CHILD_RANKS),
        "seed": 0,
    }


def decode(context: Context, shape: str, group: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one job, unless its result is there: a stage that was cut short goes on."""
    folder = context.out / "decode"
    folder.mkdir(exist_ok=True)
    wanted, result = folder / f"{shape}-{group}.job.json", folder / f"{shape}-{group}.json"
    text = json.dumps(job, indent=1) + "\n"
    if not (result.is_file() and wanted.is_file() and wanted.read_text() == text):
        result.unlink(missing_ok=True)
        wanted.write_text(text)
        command = [sys.executable, str(HERE / "decode.py"), str(wanted), str(result)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            (folder / f"{shape}-{group}.log").write_text(done.stdout + done.stderr)
            raise StageFailed(f"{shape}, {group}: {last_line(done.stderr)}")
    return json.loads(result.read_text())


def operators(context: Context) -> dict[str, Any]:
    """``ops.py``, which goes on by itself where it was cut short."""
    command = [sys.executable, str(HERE / "ops.py"), "--out", str(context.out / "ops")]
    if context.rehearse:
        command += ["--rehearse", "--stages", "walk"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise StageFailed(f"ops.py: {last_line(done.stderr)}")
    return json.loads((context.out / "ops" / "ops_gpu.json").read_text())


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:400] if lines else "it said nothing"


@dataclass(frozen=True)
class Stage:
    """A function, and how long it may take."""

    run: Callable[[Context], dict[str, Any]]
    minutes: float


STAGES: dict[str, Stage] = {
    "check": Stage(check, 4),
    "tests": Stage(tests, 4),
    "lossless": Stage(lossless, 5),
    "llama-7b": Stage(shape("llama-7b"), 7.5),
    "smollm2": Stage(smollm2, 5),
    "llama-3-8b": Stage(shape("llama-3-8b"), 7.5),
    "ops": Stage(operators, 7.5),
}
