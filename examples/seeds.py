# SPDX-License-Identifier: Apache-2.0
"""Seeded sampling: the same seed says the same with and without ReDrafter, in float32.

    python examples/seeds.py [TARGET DRAFTER_DIR]

Without arguments: SmolLM2-135M-Instruct (from PyPI, converted once) and this package's drafter.
"""

import sys
from typing import Any

from vllm import LLM, SamplingParams

PROMPT = "Once upon a time"
SEEDS = [1, 2, 3, 4]


def answers(target: str, speculative_config: dict[str, Any] | None) -> list[str]:
    """What each seed says; the engine is gone afterwards."""
    llm = LLM(
        model=target,
        speculative_config=speculative_config,
        dtype="float32",  # in bfloat16 the number of rows of a step changes roundings
        max_model_len=512,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,  # compiling takes minutes on a small machine
    )
    params = [SamplingParams(temperature=0.8, top_p=0.95, seed=s, max_tokens=48) for s in SEEDS]
    return [out.outputs[0].text for out in llm.generate([PROMPT] * len(SEEDS), params)]


def main() -> int:
    if len(sys.argv) == 3:
        target, drafter = sys.argv[1:]
    else:
        from vllm_redrafter.cli.demo import BUNDLED_DRAFTER
        from vllm_redrafter.demo.target import smollm2

        target, drafter = str(smollm2()), str(BUNDLED_DRAFTER)
    plain = answers(target, None)
    ours = answers(target, {"method": "redrafter", "model": drafter})
    for seed, text in zip(SEEDS, ours, strict=True):
        print(f"seed {seed}: {text!r}")
    equal = sum(a == b for a, b in zip(plain, ours, strict=True))
    print(f"{equal} of {len(SEEDS)} answers are plain vLLM's, {len(set(ours))} of them different")
    return 0 if equal == len(SEEDS) else 1


if __name__ == "__main__":
    sys.exit(main())
