# SPDX-License-Identifier: Apache-2.0
"""Mixed requests, and an engine under them, through the async API that servers use."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import tiny_models

# Sampling parameters of the mix; a function of a random generator, so that values vary too.
# Prompts of seeded requests stay short: vLLM's CPU engine cannot split a seeded prompt in chunks.
SHORT, LONG = (2, 20), (2, 120)


@dataclass(frozen=True)
class Request:
    """One request: always the same for the same number.

    Attributes:
        kind: which sampling parameters it takes.
        delay: seconds after the previous request's arrival.
        abort_after: cancelled by the client when it has got this many tokens; None is never.
    """

    number: int
    kind: str
    prompt: list[int]
    params: dict[str, Any]
    delay: float
    abort_after: int | None = None

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.number}"


@dataclass
class Answer:
    """What the client has got: everything, or what came before it cancelled."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)


def kinds(rng: random.Random) -> dict[str, dict[str, Any]]:
    """Sampling parameters by kind; all of them give reproducible tokens."""
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randint(1, 100)}
    seeded = {"temperature": rng.choice([0.5, 1.0]), "seed": rng.randrange(2**31),
              "max_tokens": rng.randint(1, 40)}  # fmt: skip
    return {
        "greedy": greedy,
        "greedy-long": {**greedy, "max_tokens": 100, "ignore_eos": True},
        "one-token": {**greedy, "max_tokens": 1},
        "penalties": {**greedy, "repetition_penalty": 1.2, "presence_penalty": 0.4,
                      "frequency_penalty": 0.3},
        "logprobs": {**greedy, "logprobs": rng.randint(1, 5)},
        "stop-tokens": {**greedy, "stop_token_ids": rng.sample(range(256), 12)},
        "stop-string": {**greedy, "stop": [chr(rng.randrange(97, 123)) for _ in range(3)]},
        "min-tokens": {**greedy, "max_tokens": 60, "min_tokens": rng.randint(5, 40),
                       "stop_token_ids": rng.sample(range(256), 60)},
        "allowed": {**greedy, "allowed_token_ids": rng.sample(range(256), 100)},
        "grammar": {**greedy, "regex": r"[a-f]{4,30}(-[0-9]{2,8})?\."},
        "seeded": seeded,
        "seeded-top-p": {**seeded, "top_p": 0.9, "top_k": 20},
    }  # fmt: skip


def requests(count: int, seed: int = 0, abort_share: float = 0.15) -> list[Request]:
    """A reproducible mix of ``count`` requests."""
    rng = random.Random(seed)
    mix = []
    for number in range(count):
        kind, params = rng.choice(list(kinds(rng).items()))
        length = rng.randint(*(SHORT if kind.startswith("seeded") else LONG))
        # Bursts with pauses between them.
        delay = rng.expovariate(20) if rng.random() < 0.3 else 0.0
        abort_after = rng.choice([0, 1, 3, 10]) if rng.random() < abort_share else None
        prompt = [rng.randrange(tiny_models.EOS) for _ in range(length)]
        mix.append(Request(number, kind, prompt, params, delay, abort_after))
    return mix


def sampling_params(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = dict(request.params)
    if "regex" in params:
        params["structured_outputs"] = StructuredOutputsParams(regex=params.pop("regex"))
    return SamplingParams(**params)


async def ask(engine: Any, request: Request, aborts: bool) -> Answer:
    """Send one request and read its stream; cancel it in mid-flight if it is such a one."""
    answer = Answer()
    abort_after = request.abort_after if aborts else None
    stream = engine.generate(
        {"prompt_token_ids": request.prompt}, sampling_params(request), request.id
    )
    if abort_after == 0:
        # A client that leaves before its first token.
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await stream.aclose()
        return answer
    async for output in stream:
        completion = output.outputs[0]
        answer.tokens = list(completion.token_ids)
        answer.text = completion.text
        answer.finish_reason = completion.finish_reason
        if completion.logprobs is not None:
            answer.logprobs = [
                {token: entry.logprob for token, entry in row.items()}
                for row in completion.logprobs
            ]
        if abort_after is not None and len(answer.tokens) >= abort_after:
            if request.number % 2:
                await engine.abort(request.id)
            else:
                break
    await stream.aclose()
    return answer


async def serve(engine: Any, mix: list[Request], *, aborts: bool) -> dict[int, Answer]:
    """All requests with their arrivals; answers by number."""
    tasks = []
    for request in mix:
        if aborts and request.delay:
            await asyncio.sleep(request.delay)
        tasks.append(asyncio.create_task(ask(engine, request, aborts)))
    answers = await asyncio.gather(*tasks)
    return {request.number: answer for request, answer in zip(mix, answers, strict=True)}


def with_engine(work: Callable[[Any], Awaitable[Any]], **engine_args: Any) -> Any:
    """Run ``work`` on a fresh AsyncLLM and shut that down, whatever happens."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def main() -> Any:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
        try:
            return await work(engine)
        finally:
            engine.shutdown()

    return asyncio.run(main())


def metric(name: str, **labels: str) -> float:
    """Sum of a Prometheus counter or gauge of this process, over its label sets."""
    from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

    return sum(
        entry.value
        for entry in get_metrics_snapshot()
        if isinstance(entry, (Counter, Gauge))
        and entry.name == name
        and labels.items() <= entry.labels.items()
    )
