# SPDX-License-Identifier: Apache-2.0
"""Runs one case on plain vLLM and on ReDrafter, and says where they differ.

The rule for ties: both engines compute the same logits up to rounding, because sums are made in
another order. Where two tokens are as good as equal, rounding decides. A difference therefore
counts as a tie if plain vLLM itself says the other token there once noise of the size of that
rounding is added to its logits; in any other case it is a fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_v1.engines import Engine, engine
from engine_v1.oracle import Oracle
from engine_v1.tiny_target import EOS

from sweep.space import DEFAULTS, MODEL_LENGTH, Case

# Twice the largest difference of the tiny target's logits that was measured, 1.8e-5 (README).
NOISE = 4e-5
TRIALS = 24
LOGPROB_TOLERANCE = 1e-3

Answer = list[dict[str, Any]]


@dataclass
class Finding:
    """A request that ReDrafter answered otherwise.

    Attributes:
        request: its number in the case.
        what: for people.
        tie: the difference is one of rounding.
    """

    request: int
    what: str
    tie: bool


@dataclass
class Totals:
    """What a sweep has seen."""

    cases: int = 0
    requests: int = 0
    tokens: int = 0
    moves: int = 0
    preemptions: int = 0
    ties: int = 0
    faults: list[tuple[Case, Finding]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.tokens} tokens in {self.cases} batches, "
            f"{self.moves} KV rows moved, {self.preemptions} preemptions: {len(self.faults)} "
            f"differences, {self.ties} ties"
        )


def drive(which: Engine, case: Case) -> dict[int, Answer]:
    """Answers by request number, those that were taken back not among them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = which.llm.llm_engine
    waiting = sorted(enumerate(case["requests"]), key=lambda pair: pair[1]["at"])
    ends: dict[int, list[str]] = {}
    answers: dict[int, Answer] = {}
    step = 0
    while waiting or llm.has_unfinished_requests():
        if not llm.has_unfinished_requests() and waiting:
            step = max(step, waiting[0][1]["at"])
        while waiting and waiting[0][1]["at"] <= step:
            number, request = waiting.pop(0)
            params = SamplingParams(
                **request["params"], output_kind=RequestOutputKind.FINAL_ONLY
            )
            llm.add_request(
                str(number), {"prompt_token_ids": list(request["prompt"])}, params,
                priority=request.get("priority", 0),
            )  # fmt: skip
            if "aborted_after" in request:
                ends.setdefault(step + request["aborted_after"], []).append(str(number))
        for output in llm.step():
            if output.finished:
                answers[int(output.request_id)] = _answer(output)
        step += 1
        # Finished ones may be among them, as when a client goes away late.
        llm.abort_request(ends.pop(step, []))
    for number, request in enumerate(case["requests"]):
        if "aborted_after" in request:
            answers.pop(number, None)
    return answers


def _answer(output: Any) -> Answer:
    return [
        {
            "tokens": list(said.token_ids),
            "text": said.text,
            "finish_reason": said.finish_reason,
            "stop_reason": said.stop_reason,
            "logprobs": [row[token].logprob for token, row in zip(
                said.token_ids, said.logprobs, strict=True)] if said.logprobs else [],
        }
        for said in sorted(output.outputs, key=lambda said: said.index)
    ]  # fmt: skip


def first_difference(want: list[int], have: list[int]) -> int:
    """Where two answers part; the length of the shorter one if it begins the other."""
    pairs = enumerate(zip(want, have, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(want), len(have)))


@dataclass
class Sweep:
    """Engines and totals of a sweep.

    Args:
        target, drafter: directories.
    """

    target: Path
    drafter: Path
    totals: Totals = field(default_factory=Totals)

    def plain(self, settings: dict[str, Any] | None = None) -> Engine:
        """Plain vLLM; with no settings the one that all answers are compared with."""
        settings = DEFAULTS if settings is None else settings
        return engine(
            self.target, **{k: v for k, v in settings.items() if not k.startswith("spec_")}
        )

    def trees(self, settings: dict[str, Any]) -> Engine:
        return engine(self.target, self.drafter, **settings)

    def run(self, case: Case) -> list[Finding]:
        """All differences of one case, ties included; they are counted."""
        which, expected, got = self._both(case)
        findings = list(self._findings(case, expected, got))
        self._count(case, which, got, findings)
        return findings

    def fails(self, case: Case) -> bool:
        """Whether the case shows a difference that is no tie: for shrinking."""
        _, expected, got = self._both(case)
        return any(not finding.tie for finding in self._findings(case, expected, got))

    def _both(self, case: Case) -> tuple[Engine, dict[int, Answer], dict[int, Answer]]:
        """The engine with trees, plain vLLM's answers, and that engine's."""
        plain = self.plain()
        plain.reset()
        # All at once and to their ends: what is said must not depend on when it is asked.
        alone = [{"prompt": r["prompt"], "params": r["params"], "at": 0} for r in case["requests"]]
        expected = drive(plain, {"requests": alone})
        which = self.trees(case["settings"])
        which.reset(None if case["oracle"] is None else self._oracle(case, expected))
        return which, expected, drive(which, case)

    def _findings(
        self, case: Case, expected: dict[int, Answer], got: dict[int, Answer]
    ) -> Iterator[Finding]:
        for number, answer in sorted(got.items()):
            yield from self._compare(case, number, expected[number], answer)

    def _oracle(self, case: Case, expected: dict[int, Answer]) -> Oracle:
        class Said:
            def __init__(self, prompt: list[int], answer: Answer) -> None:
                self.prompt_token_ids = prompt
                self.outputs = [type("Said", (), {"token_ids": one["tokens"]}) for one in answer]

        outputs = [
            Said(case["requests"][number]["prompt"], answer) for number, answer in expected.items()
        ]
        nodes = case["settings"]["spec_num_speculative_tokens"]
        return Oracle(outputs, nodes, range(EOS), **case["oracle"])

    def _count(
        self, case: Case, which: Engine, got: dict[int, Answer], findings: list[Finding]
    ) -> None:
        totals = self.totals
        totals.cases += 1
        totals.requests += len(got)
        totals.tokens += sum(len(one["tokens"]) for answer in got.values() for one in answer)
        totals.moves += which.stats["moves"]
        totals.preemptions += which.preemptions
        totals.ties += sum(finding.tie for finding in findings)
        totals.faults += [(case, finding) for finding in findings if not finding.tie]

    def _compare(
        self, case: Case, number: int, expected: Answer, got: Answer
    ) -> Iterator[Finding]:
        assert len(expected) == len(got)
        for index, (want, have) in enumerate(zip(expected, got, strict=True)):
            where = f"request {number}, completion {index}"
            if want["tokens"] == have["tokens"]:
                for name in ("finish_reason", "stop_reason", "text"):
                    if want[name] != have[name]:
                        yield Finding(number, f"{where}: {name} {have[name]!r}, not "
                                      f"{want[name]!r}", False)  # fmt: skip
                pairs = zip(want["logprobs"], have["logprobs"], strict=True)
                worst = max((abs(a - b) for a, b in pairs), default=0.0)
                if worst > LOGPROB_TOLERANCE:
                    yield Finding(number, f"{where}: a log-probability is {worst:g} off", False)
                continue
            at = first_difference(want["tokens"], have["tokens"])
            text = f"{where}: differs from token {at} on: {have['tokens'][at:][:4]}, not "
            text += f"{want['tokens'][at:][:4]}"
            tie = self.is_tie(case["requests"][number], index, at, have["tokens"])
            yield Finding(number, text, tie)

    def is_tie(self, request: Case, index: int, at: int, said: list[int]) -> bool:
        """Whether plain vLLM says ``said[: at + 1]`` once some noise is on its logits."""
        if at >= len(said):
            return False
        plain = self.plain()
        params = {**request["params"], "max_tokens": at + 1}
        if "min_tokens" in params:
            params["min_tokens"] = min(params["min_tokens"], at + 1)
        alone = {"requests": [{"prompt": request["prompt"], "params": params, "at": 0}]}
        for seed in range(TRIALS):
            plain.reset()
            with _noise(plain, seed):
                tokens = drive(plain, alone)[0][index]["tokens"]
            if tokens[: at + 1] == said[: at + 1]:
                return True
        return False


@contextlib.contextmanager
def _noise(plain: Engine, seed: int) -> Iterator[None]:
    model = plain.runner.model
    computed = model.compute_logits
    generator = torch.Generator().manual_seed(seed)

    def noisy(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = computed(*args, **kwargs)
        return logits + NOISE * (2 * torch.rand(logits.shape, generator=generator) - 1)

    model.compute_logits = noisy
    try:
        yield
    finally:
        del model.compute_logits


assert MODEL_LENGTH <= 1024  # of the tiny target
