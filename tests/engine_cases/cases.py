# SPDX-License-Identifier: Apache-2.0
"""What both engines are asked through ``LLM.generate``: data, without an engine.

Counts of tokens are small, because Model Runner V2 runs under Triton's interpreter here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_v1.tiny_target import EOS, prompts
from tokenizers.pre_tokenizers import ByteLevel

Prompts = list[list[int]]
Params = list[dict[str, Any]]

# The character of every token id, for printable ones of ASCII the character itself.
IDS = sorted(ByteLevel.alphabet())

# Reasons that requests fall back for, as the engines count them.
GRAMMAR = "structured output (chain)"
PENALTIES = "penalties (chain)"
BAD_WORDS = "bad words (chain)"
PADDED = "a schedule that is no prefix of the draft"


@dataclass(frozen=True)
class Case:
    """One batch of requests.

    Attributes:
        name: also of the test.
        prompts: token ids by request.
        params: of ``SamplingParams``, by request, or made from the tokens that plain vLLM says when
            nothing is asked for.
        settings: of ``LLM``; ``spec_*`` are ReDrafter's.
        oracle: of the drafter that the tests put in, see ``engine_v1.oracle``.
        knows_on: the drafter knows how an answer would have gone on behind its end.
        again: prompts of a second round, with the first one's blocks still cached.
        moves: KV rows that must have been moved.
        accepted: drafted tokens a step that must have been accepted.
        moves_v2: the same on Model Runner V2, where fewer requests may branch.
        fallbacks_v1: reasons that must have been counted, and no others.
        fallbacks_v2: the same on Model Runner V2.
        preempts: requests must have been preempted.
        cached: prompt tokens that each request of the second round must have found cached.
        shows: whether the answers show what the case is about.
    """

    name: str
    prompts: Prompts
    params: Params | Callable[[Prompts], Params]
    settings: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    knows_on: bool = False
    again: Callable[[Prompts, Prompts], Prompts] | None = None
    moves: int = 5
    accepted: float = 0.5
    moves_v2: int | None = None
    fallbacks_v1: frozenset[str] = frozenset()
    fallbacks_v2: frozenset[str] = frozenset()
    preempts: bool = False
    cached: int = 0
    shows: Callable[[Sequence[dict[str, Any]], Params], bool] = lambda said, params: True

    @property
    def has_greedy(self) -> bool:
        # Parameters that are made from answers are greedy, all of them.
        return callable(self.params) or any(map(is_greedy, self.params))

    @property
    def has_seeded(self) -> bool:
        return not (callable(self.params) or all(map(is_greedy, self.params)))


def greedy(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": 20, **more}


def seeded(seed: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": seed, "max_tokens": 20, **more}


def letters(*tokens: int) -> str | None:
    """The tokens' text if all are printable characters of ASCII."""
    found = "".join(IDS[token] for token in tokens if token != EOS)
    return found if len(found) == len(tokens) and found.isascii() else None


def is_greedy(params: dict[str, Any]) -> bool:
    return params["temperature"] == 0


# -- parameters made from what would be said without them ------------------------------------------


def stop_tokens(said: Prompts) -> Params:
    """Some token of the middle of each answer ends it."""
    return [greedy(stop_token_ids=[row[3 + i]]) for i, row in enumerate(said)]


def stop_strings(said: Prompts) -> Params:
    return [greedy(stop=[next(filter(None, map(letters, row[3:])))]) for row in said]


def min_tokens(said: Prompts) -> Params:
    """Without min_tokens all would stop at the fourth token."""
    return [greedy(stop_token_ids=[row[3]], min_tokens=6 + i) for i, row in enumerate(said)]


def bad_words(said: Prompts) -> Params:
    """The first two letters in a row of each answer, or its first letter."""

    def word(row: list[int]) -> str:
        pairs = (letters(*row[i : i + 2]) for i in range(len(row) - 1))
        return next(filter(None, [*pairs, *map(letters, row)]))

    return [greedy(bad_words=[word(row)]) for row in said]


# -- what an answer must look like -----------------------------------------------------------------


def tokens(request: dict[str, Any]) -> list[int]:
    return request["completions"][0]["tokens"]


def text(request: dict[str, Any]) -> str:
    """Of the tokens alone; behind a prompt that is no text, vLLM's text repeats some of it."""
    return "".join(IDS[token] for token in tokens(request) if token != EOS).replace("\u0120", " ")


def all_stopped(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(request["completions"][0]["finish_reason"] == "stop" for request in said)


def no_bad_word(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return not any(
        row["bad_words"][0] in text(request) for request, row in zip(said, params, strict=True)
    )


def long_enough(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(len(tokens(r)) >= row["min_tokens"] for r, row in zip(said, params, strict=True))


def as_long_as_asked(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(len(tokens(r)) == row["max_tokens"] for r, row in zip(said, params, strict=True))


def up_to_the_limit(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(len(r["prompt"]) + len(tokens(r)) == SHORT["max_model_len"] for r in said)


def grammars_hold(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(
        re.fullmatch(row["structured_outputs"]["regex"], text(request))
        for request, row in zip(said, params, strict=True)
        if "regex" in row.get("structured_outputs", {})
    )


def logprobs_where_asked(said: Sequence[dict[str, Any]], params: Params) -> bool:
    """A row per token, as wide as asked for or one wider, and no rows where none were wanted."""

    def right(rows: Any, width: int | None, count: int) -> bool:
        if width is None:
            return rows is None
        # The first prompt token has no row, and the token that was said may be beyond the width.
        return len(rows) == count and all(width <= len(row) <= width + 1 for row in rows[1:])

    return all(
        right(request["completions"][0]["logprobs"], row.get("logprobs"), len(tokens(request)))
        and right(request["prompt_logprobs"], row.get("prompt_logprobs"), len(request["prompt"]))
        for request, row in zip(said, params, strict=True)
    )


def all_differ(said: Sequence[dict[str, Any]], params: Params) -> bool:
    every = [tuple(c["tokens"]) for request in said for c in request["completions"]]
    return len(set(every)) == len(every)


def allowed_only(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(
        set(tokens(request)) <= set(row["allowed_token_ids"])
        for request, row in zip(said, params, strict=True)
        if "allowed_token_ids" in row
    )


def biases_show(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return (
        set(tokens(said[1])) <= set(range(20, 60))
        and set(tokens(said[2])) <= set(range(250, 257))
        and set(tokens(said[5])) == {7}
        and set(tokens(said[7])) <= set(LOW)
    )


def some_end_and_some_go_on(said: Sequence[dict[str, Any]], params: Params) -> bool:
    return all(
        EOS in tokens(request)[:-1] if row.get("ignore_eos") else tokens(request)[-1] == EOS
        for request, row in zip(said, params, strict=True)
    )


# -- the list --------------------------------------------------------------------------------------

BATCH = prompts(8)
# After these the end token comes early.
ENDING = [prompts(123)[i] for i in (3, 67, 90, 92, 117, 78, 122, 29)]
LETTERS = [IDS.index(letter) for letter in "abcdefghijklmnop0123456789"]
# How many characters were said decides what may follow: a mask of the wrong depth shows.
COUNTED = {"regex": r"[a-p]{4}[0-9]{4}[a-p]{4}"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LOW = range(100)
CHUNKED = {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}
SHORT = {"max_model_len": 64}
TIGHT = {"num_gpu_blocks_override": 10}


def mixed(count: int) -> tuple[Prompts, Params]:
    """Requests of all kinds as they come, a few tokens each."""
    source = random.Random(0)
    asked = []
    for number in range(count):
        some = source.sample(range(EOS), 100)
        kind = source.choice(
            [
                greedy(),
                greedy(ignore_eos=True),
                seeded(number),
                seeded(number, temperature=0.6, top_p=0.9, top_k=20),
                seeded(number, n=2),
                greedy(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
                greedy(bad_words=["a", "b"]),
                greedy(logprobs=number % 4),
                seeded(number, logprobs=2),
                greedy(stop_token_ids=some[:12]),
                greedy(stop=["e", "t", "0"]),
                greedy(stop_token_ids=some[:60], min_tokens=1 + number % 5),
                greedy(allowed_token_ids=some),
                greedy(structured_outputs={"regex": r"[a-f]{3,8}(-[0-9]{2})?\."}),
            ]
        )
        asked.append({**kind, "max_tokens": source.choice((1, 4, 8))})
        asked[-1]["min_tokens"] = min(kind.get("min_tokens", 0), asked[-1]["max_tokens"])
    return prompts(count, shortest=2, longest=30, seed=21), asked


CASES = [
    Case("greedy", BATCH, [greedy()] * 8, accepted=1.5),
    Case("one-at-a-time", prompts(1, seed=11), [greedy(max_tokens=30)], moves=3),
    Case("seeded", BATCH[:6], [seeded(i, max_tokens=16) for i in range(6)], shows=all_differ),
    Case(
        "the-seed-decides",
        [BATCH[0]] * 4,
        [seeded(i, max_tokens=8) for i in range(4)],
        moves=2,
        shows=all_differ,
    ),
    Case(
        "temperature-top-k-top-p",
        BATCH[:4],
        [
            seeded(0, max_tokens=16, top_p=0.8),
            seeded(1, max_tokens=16, top_k=5),
            seeded(2, max_tokens=16, temperature=0.6, top_p=0.9, top_k=20),
            seeded(3, max_tokens=16, temperature=1.7),
        ],
        shows=all_differ,
    ),
    Case(
        "several-completions",
        BATCH[:2],
        [seeded(i, n=3, temperature=0.8, max_tokens=10) for i in range(2)],
        shows=all_differ,
    ),
    Case("stop-tokens", BATCH, stop_tokens, knows_on=True, accepted=0.3, shows=all_stopped),
    Case("stop-strings", BATCH, stop_strings, accepted=0.3, shows=all_stopped),
    Case(
        "the-end-token-and-ignore-eos",
        ENDING,
        [greedy(ignore_eos=bool(i % 2)) for i in range(8)],
        shows=some_end_and_some_go_on,
    ),
    Case(
        "few-tokens",
        BATCH,
        [greedy(max_tokens=count, ignore_eos=True) for count in (1, 2, 3, 1, 17, 5, 1, 9)],
        moves=2,
        shows=as_long_as_asked,
    ),
    Case("min-tokens", BATCH, min_tokens, accepted=0.3, shows=long_enough),
    Case(
        "logprobs",
        BATCH,
        [
            (seeded(i, logprobs=width) if i % 2 else greedy(logprobs=width))
            for i, width in enumerate((5, None, 1, 5, 0, None, 5, 3))
        ],
        shows=logprobs_where_asked,
    ),
    Case(
        "prompt-logprobs",
        BATCH[:6],
        [greedy(logprobs=2, prompt_logprobs=width) for width in (4, None, 1, 4, None, 0)],
        shows=logprobs_where_asked,
    ),
    Case(
        "penalties",
        BATCH[:6],
        [
            greedy(repetition_penalty=1.4),
            greedy(presence_penalty=1.5),
            greedy(),
            greedy(frequency_penalty=0.8),
            greedy(repetition_penalty=1.2, presence_penalty=0.7, frequency_penalty=-0.3),
            seeded(5, repetition_penalty=1.3, top_p=0.9),
        ],
        moves_v2=1,
        accepted=0.3,
        fallbacks_v2=frozenset({PENALTIES}),
    ),
    Case(
        "bad-words",
        BATCH,
        bad_words,
        moves_v2=0,
        accepted=0.1,
        fallbacks_v2=frozenset({BAD_WORDS}),
        shows=no_bad_word,
    ),
    Case(
        "allowed-tokens",
        BATCH,
        [greedy(**({"allowed_token_ids": list(range(20, 60))} if i % 3 else {})) for i in range(8)],
        shows=allowed_only,
    ),
    Case(
        "min-p-and-logit-bias",
        BATCH,
        [
            {**row, "max_tokens": 10}
            for row in (
                seeded(0, min_p=0.2),
                greedy(logit_bias={token: 50.0 for token in range(20, 60)}),
                seeded(2, logit_bias={token: -100.0 for token in range(250)}),
                greedy(min_p=0.5),
                seeded(4, min_p=0.1, top_k=30, logprobs=2),
                greedy(logit_bias={7: 100.0}),
                seeded(6, logit_bias={token: 4.0 for token in range(100, 140)}, min_p=0.1),
                greedy(logit_bias={token: 5.0 for token in range(9)}, allowed_token_ids=[*LOW]),
            )
        ],
        shows=biases_show,
    ),
    Case(
        "structured-outputs",
        BATCH,
        [
            greedy(structured_outputs=COUNTED, max_tokens=14),
            greedy(),
            greedy(structured_outputs={"choice": ["positive", "negative", "neither"]}),
            greedy(),
            greedy(structured_outputs={"json": SCHEMA}, max_tokens=40),
            greedy(),
            greedy(structured_outputs={"regex": r"(yes|no), [0-9]{1,4}"}),
            seeded(7, structured_outputs=COUNTED, max_tokens=14),
        ],
        oracle={"chain_first": True, "vocab": LETTERS},
        moves=0,
        fallbacks_v2=frozenset({GRAMMAR}),
        shows=grammars_hold,
    ),
    Case(
        "long-prompts",
        prompts(4, shortest=180, longest=230, seed=5),
        [greedy(max_tokens=16)] * 4,
        moves=3,
    ),
    Case(
        "one-token-prompts",
        # More than fit at once: those that come later are padded.
        [prompt[:1] for prompt in prompts(12)],
        [greedy(max_tokens=6 + i) for i in range(12)],
        moves=2,
        fallbacks_v1=frozenset({PADDED}),
    ),
    Case(
        "prefix-cache",
        prompts(4, shortest=20, seed=4),
        [greedy(max_tokens=24, ignore_eos=True)] * 4,
        again=lambda prompts, said: [
            prompt + row + [7, 8, 9] for prompt, row in zip(prompts, said, strict=True)
        ],
        cached=32,
    ),
    Case(
        "cached-but-for-one-token",
        prompts(4, shortest=65, longest=65),
        [(seeded(i, max_tokens=12) if i % 2 else greedy(max_tokens=12)) for i in range(4)],
        again=lambda prompts, said: prompts,
        cached=64,
        fallbacks_v1=frozenset({PADDED}),
    ),
    Case(
        "chunked-prefill",
        prompts(6, shortest=40, longest=110, seed=3),
        [
            greedy(logprobs=2, prompt_logprobs=1) if i % 3 == 0 else greedy(ignore_eos=True)
            for i in range(6)
        ],
        settings=CHUNKED,
        accepted=0.3,
        shows=logprobs_where_asked,
    ),
    Case(
        "preempted",
        prompts(6, shortest=26, longest=30),
        [
            {**(seeded(i) if i % 2 else greedy()), "max_tokens": 28, "ignore_eos": True}
            for i in range(6)
        ],
        settings=TIGHT,
        preempts=True,
        shows=as_long_as_asked,
    ),
    Case(
        "to-the-end-of-the-context",
        prompts(6, shortest=40, longest=62),
        [greedy(max_tokens=None, ignore_eos=True)] * 6,
        settings=SHORT,
        moves=3,
        accepted=0.3,
        shows=up_to_the_limit,
    ),
    Case(
        "sixty-of-mixed-kinds",
        *mixed(60),
        accepted=0.3,
        fallbacks_v2=frozenset({GRAMMAR, PENALTIES, BAD_WORDS}),
    ),
]
