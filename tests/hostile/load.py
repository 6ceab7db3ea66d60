# SPDX-License-Identifier: Apache-2.0
"""What a hostile crowd sends: requests of every size and kind, wrong ones, and clients that leave.

Every request is a value of its own, so that two servers can be asked the same and a run can be had
again from its seed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

TOKENS = 256  # of the byte tokenizer; the target has a few more
LONGEST = 512  # max_model_len of the servers


@dataclass(frozen=True)
class Request:
    """One POST to /v1/completions.

    Attributes:
        kind: what it is, for the report.
        body: its bytes, which need not be JSON.
        exact: the answer has to be plain vLLM's, token for token.
        leave_after: the client closes the connection after that many parts of the stream; None
            reads to the end.
    """

    kind: str
    body: bytes
    exact: bool = True
    leave_after: int | None = None


@dataclass(frozen=True)
class Answer:
    """Status and, where the stream was read to its end, (tokens, text, reason) of every choice."""

    status: int
    choices: tuple[Any, ...] = ()
    error: str = ""


def completion(prompt: Any, **fields: Any) -> bytes:
    body = {"model": "target", "prompt": prompt, "temperature": 0, "max_tokens": 32,
            "return_token_ids": True, "stream": True, **fields}  # fmt: skip
    return json.dumps(body).encode()


def tokens(source: random.Random, length: int) -> list[int]:
    return [source.randrange(TOKENS) for _ in range(length)]


def good(source: random.Random) -> Request:
    """One that any server answers; its answer is reproducible."""
    prompt = tokens(source, source.randint(1, 60))
    # What follows is drafted for best where it was said before.
    if source.random() < 0.3:
        prompt = prompt[:20] * source.randint(2, 4)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"max_tokens": source.randint(1, 100)},
        "one token": {"max_tokens": 1},
        "seeded": {"temperature": source.choice([0.5, 1.0]), "seed": source.randrange(2**31)},
        "seeded top-p": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 5},
        "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
        "logit bias": {"logit_bias": {"7": 20.0, "9": 20.0}},
        "min_p": {"min_p": 0.2, "temperature": 1.0, "seed": source.randrange(2**31)},
        "stop": {"stop": [chr(source.randrange(97, 123)) for _ in range(3)]},
        "stop tokens": {"stop_token_ids": source.sample(range(TOKENS), 12), "min_tokens": 3},
        "bad words": {"bad_words": ["a", "b", "ab"]},
        "grammar": {"structured_outputs": {"regex": r"[a-f]{4,30}(-[0-9]{2,8})?\."}},
        "logprobs": {"logprobs": source.randint(1, 5)},
        "several": {"n": 3, "temperature": 1.0, "seed": source.randrange(2**31)},
        "ignore eos": {"ignore_eos": True, "max_tokens": 120},
    }
    kind, fields = source.choice(list(kinds.items()))
    return Request(kind, completion(prompt, **fields))


def of_extreme_size(source: random.Random) -> Request:
    """To the limit of the context, and beyond it."""
    return source.choice(
        [
            Request("maximal prompt", completion(tokens(source, LONGEST - 1), max_tokens=1)),
            Request("maximal answer", completion([3], max_tokens=LONGEST - 1, ignore_eos=True)),
            Request("prompt too long", completion(tokens(source, LONGEST))),
            Request("huge prompt", completion("x" * 400_000)),
            Request("answer too long", completion(tokens(source, 9), max_tokens=LONGEST)),
            Request("no tokens", completion(tokens(source, 9), max_tokens=0)),
            Request("no prompt", completion([])),
            Request("empty string", completion("")),
            Request("many prompts", completion([tokens(source, 4) for _ in range(30)])),
        ]
    )


def malformed(source: random.Random) -> Request:
    """What a server must refuse, or bear."""
    wrong = [
        b"", b"{", b"null", b"[]", b"\xff\xfe\x00", b'{"model": "target"}', b"[" * 20_000,
        completion(tokens(source, 5), model="nobody"),
        completion([TOKENS + 10_000]), completion([-1]), completion([2**63]), completion([1.5]),
        completion({"text": "x"}), completion(None),
        *(
            completion(tokens(source, 5), **fields)
            for fields in (
                {"max_tokens": -1}, {"max_tokens": 2**70}, {"max_tokens": "many"},
                {"temperature": -1}, {"temperature": "hot"}, {"temperature": 1e300},
                {"top_p": 0}, {"top_p": 7}, {"top_k": 2**64}, {"top_k": -7}, {"min_p": 3},
                {"seed": 2**70}, {"n": 0}, {"n": 10_000_000}, {"logprobs": 10_000},
                {"logit_bias": {"x": 1}}, {"logit_bias": {"100000": 1}}, {"stop": [""] * 3},
                {"stop_token_ids": [-5]}, {"bad_words": [""]},
                {"structured_outputs": {"regex": "(["}}, {"structured_outputs": {"json": "{"}},
                {"structured_outputs": {"choice": []}}, {"stream": "perhaps"},
                {"vllm_xargs": {"nobody": "knows"}}, {"unknown_field": [1]},
            )
        ),
    ]  # fmt: skip
    return Request("malformed", source.choice(wrong))


def leaving(source: random.Random) -> Request:
    """A client that goes away in mid-stream, or before anything came."""
    request = good(source)
    return Request("leaves", request.body, exact=False, leave_after=source.choice([0, 1, 2, 5]))


def request(source: random.Random) -> Request:
    """One of the crowd."""
    makers = (good, of_extreme_size, malformed, leaving)
    return source.choices(makers, weights=(60, 8, 17, 15))[0](source)
