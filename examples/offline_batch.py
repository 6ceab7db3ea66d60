# SPDX-License-Identifier: Apache-2.0
"""Answer a few questions in one batch, with ReDrafter.

    python examples/offline_batch.py [TARGET DRAFTER]

Without arguments: SmolLM2-135M-Instruct (from PyPI, converted once) and this package's drafter.
"""

import sys

from vllm import LLM, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Name three uses of a paper clip.",
]


def main() -> None:
    if len(sys.argv) == 3:
        target, drafter = sys.argv[1:]
    else:
        from vllm_redrafter.cli.demo import BUNDLED_DRAFTER
        from vllm_redrafter.demo.target import smollm2

        target, drafter = str(smollm2()), str(BUNDLED_DRAFTER)

    llm = LLM(
        model=target,
        speculative_config={"method": "redrafter", "model": drafter},
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,  # compiling takes minutes on a small machine
        disable_log_stats=False,  # keeps the counters printed below
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, answer in zip(
        QUESTIONS, llm.chat(chats, SamplingParams(temperature=0, max_tokens=96)), strict=True
    ):
        print(f"\n> {question}\n{answer.outputs[0].text}")

    counts = {metric.name: metric for metric in llm.get_metrics()}
    drafts = counts["vllm:spec_decode_num_drafts"].value
    accepted = counts["vllm:spec_decode_num_accepted_tokens"].value
    print(f"\nacceptance length {1 + accepted / drafts:.2f} (1 without a drafter)")


if __name__ == "__main__":
    main()
