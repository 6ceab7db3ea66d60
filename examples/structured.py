# SPDX-License-Identifier: Apache-2.0
"""JSON by a schema beside free text, at the same time, from one server.

    vllm serve TARGET --speculative-config '{"method": "redrafter", "model": "DRAFTER_DIR"}'
    python examples/structured.py

A request with a grammar is drafted for with a chain, its neighbours with trees; nothing is to be
set for that.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
REQUESTS: dict[str, dict[str, Any]] = {
    "free text": {"messages": [{"role": "user", "content": "Tell me about Rome."}]},
    "by a schema": {
        "messages": [{"role": "user", "content": "Which weather do I ask for? Rome, in celsius."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": WEATHER, "strict": True},
        },
    },
}


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )
    model = client.models.list().data[0].id

    def ask(request: dict[str, Any]) -> Any:
        answer = client.chat.completions.create(
            model=model, temperature=0, max_tokens=96, **request
        )
        return answer.choices[0].message

    with ThreadPoolExecutor() as pool:
        free, by_schema = pool.map(ask, REQUESTS.values())
    print("free text:", free.content)
    print("by a schema:", json.loads(by_schema.content))


if __name__ == "__main__":
    main()
