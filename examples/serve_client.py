# SPDX-License-Identifier: Apache-2.0
"""Stream an answer from a server that drafts with ReDrafter.

In one terminal, with the directories that you use:

    vllm serve TARGET --served-model-name target --max-model-len 2048 \
        --speculative-config '{"method": "redrafter", "model": "DRAFTER_DIR"}'

In another:

    python examples/serve_client.py "Why is the sky blue?"

The server speaks OpenAI's protocol, so any client does; nothing in it knows about drafting.
"""

import os
import sys

from openai import OpenAI


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
    base_url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "unused"))
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=128,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
