# SPDX-License-Identifier: Apache-2.0
"""Where the time of one engine step goes, with ReDrafter and without.

Two engines in one process, the same prompts in turn; wall time of each part per step, median over
rounds of the mean per step. "ours" is everything of ReDrafter except the target's forward pass, its
logits and the draft's matrix products. Run on a quiet machine:

    python benchmarks/step_profile.py --target DIR --drafter DIR --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path

OURS = ("prepare", "walk", "move", "tree")


class Probe:
    """Sums the wall time of some methods of one object."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def wrap(self, owner: object, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Milliseconds per step since the last call."""
        steps = max(self.calls["step"], 1)
        result = {name: 1000 * value / steps for name, value in self.seconds.items()}
        result["steps"] = steps
        self.seconds.clear()
        self.calls.clear()
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8, help="MT-bench first turns")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speculative", default="{}", help="further JSON keys")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    from vllm_redrafter.demo.prompts import chat_token_ids, mt_bench, spread

    ids = chat_token_ids(spread(mt_bench(), args.prompts), args.target)
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    common = {
        "model": args.target,
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": max(args.batch, 1),
        "enable_prefix_caching": False,
    }
    config = {"method": "redrafter", "model": args.drafter, **json.loads(args.speculative)}
    engines = {"plain": LLM(**common), "redrafter": LLM(**common, speculative_config=config)}
    probes = {name: attach(engine) for name, engine in engines.items()}
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)

    rows: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    speed: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.generate(prompts[:1], params, use_tqdm=False)
    for number in range(args.rounds):
        for name in list(engines)[:: 1 if number % 2 == 0 else -1]:
            before = stats(engines[name])
            probes[name].take()
            start, tokens = time.perf_counter(), 0
            for at in range(0, len(prompts), args.batch):
                group = prompts[at : at + args.batch]
                for output in engines[name].generate(group, params, use_tqdm=False):
                    tokens += len(output.outputs[0].token_ids)
            speed[name].append(tokens / (time.perf_counter() - start))
            row = probes[name].take()
            after = stats(engines[name])
            for part in after:
                spent = after[part] - before.get(part, 0.0)
                row[part] = 1000 * spent / row["steps"]
            rows[name].append(row)

    report = {
        name: {
            part: statistics.median(row.get(part, 0.0) for row in rows[name])
            for part in sorted({part for row in rows[name] for part in row})
        }
        for name in engines
    }
    ours = sum(report["redrafter"].get(part, 0.0) for part in OURS)
    ratio = statistics.median(
        b / a for a, b in zip(speed["plain"], speed["redrafter"], strict=True)
    )
    report["summary"] = {
        "ratio": ratio,
        "ours_ms_per_step": ours,
        "ours_share_of_plain_step": ours / report["plain"]["step"],
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}, **report}))


def attach(engine) -> Probe:
    """Time one step, and the target's forward pass, logits and sampling inside it."""
    probe = Probe()
    core = engine.llm_engine.engine_core.engine_core
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    probe.wrap(core, "step_fn", "step")
    probe.wrap(runner, "_model_forward", "target forward")
    probe.wrap(runner.model, "compute_logits", "target logits")
    probe.wrap(runner, "_sample", "sample")
    probe.wrap(runner, "_prepare_inputs", "prepare inputs (with vLLM's)")
    return probe


def stats(engine) -> dict[str, float]:
    """Seconds that the worker counted by part; nothing for a plain engine."""
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    counted = getattr(runner, "redrafter_stats", None)
    return dict(counted.seconds) if counted else {}


if __name__ == "__main__":
    main()
