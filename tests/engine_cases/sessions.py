# SPDX-License-Identifier: Apache-2.0
"""Sessions with streamed input: requests of several turns, as ``AsyncLLM.generate`` makes them.

What a turn said stands in the prompt of the next one, but for its last token, which vLLM drops. So
what the engine believes to have computed must be right where a turn ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from engine_v1.tiny_target import EOS, prompts
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

# Sessions, and turns of each.
SIZE = (6, 5)

# Behind a turn's end, so that a tree can lead there.
BEHIND = 12


@dataclass
class Session:
    """One session.

    Attributes:
        chunks: what every turn adds to the text.
        at_once: all chunks are there from the start; else each comes when the turn before is over.
        said: tokens of every turn so far.
        contexts: the text that every turn continues.
        reasons: why each turn ended.
    """

    chunks: list[list[int]]
    at_once: bool
    said: list[list[int]] = field(default_factory=list)
    contexts: list[list[int]] = field(default_factory=list)
    reasons: list[Any] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return len(self.reasons) == len(self.chunks)

    def begin_turn(self) -> None:
        kept = self.contexts[-1] + self.said[-1][:-1] if self.said else []
        self.contexts.append(kept + self.chunks[len(self.contexts)])
        self.said.append([])


def make_sessions(size: tuple[int, int], seed: int = 3) -> list[Session]:
    sessions, turns = size
    chunks = prompts(sessions * turns, seed=seed)
    return [
        Session([chunk[:9] for chunk in chunks[i * turns : (i + 1) * turns]], i % 2 == 0)
        for i in range(sessions)
    ]


def run(engine: Any, params: SamplingParams, size: tuple[int, int]) -> list[Session]:
    """All sessions side by side, on an ``Engine`` in this process."""
    return _Run(engine, params, size).sessions


class _Run:
    def __init__(self, engine: Any, params: SamplingParams, size: tuple[int, int]) -> None:
        llm = engine.llm.llm_engine
        self._core, self._processor = llm.engine_core, llm.input_processor
        self._params = params
        self.sessions = make_sessions(size)
        for name, session in enumerate(self.sessions):
            session.begin_turn()
            for chunk in session.chunks if session.at_once else session.chunks[:1]:
                self._send(name, chunk)
        while not all(session.over for session in self.sessions):
            for output in self._core.get_output().outputs:
                self._note(int(output.request_id), output)
        for name in range(len(self.sessions)):
            self._send(name, [0], resumable=False)
        while engine.scheduler.has_requests():
            self._core.get_output()

    def _send(self, name: int, chunk: list[int], resumable: bool = True) -> None:
        request = self._processor.process_inputs(
            str(name), {"prompt_token_ids": list(chunk)}, self._params.clone(), ("generate",),
            resumable=resumable,
        )  # fmt: skip
        request.external_req_id = str(name)
        self._core.add_request(request)

    def _note(self, name: int, output: Any) -> None:
        session = self.sessions[name]
        session.said[-1] += output.new_token_ids
        if output.finish_reason is None:
            return
        session.reasons.append((output.finish_reason, output.stop_reason))
        if session.over:
            return
        session.begin_turn()
        if not session.at_once:
            self._send(name, session.chunks[len(session.said) - 1])


# A text of random weights says all letters: each of them ends some turn.
STOPS = list(range(40, 90))
KINDS = {
    "max_tokens 6": {"max_tokens": 6, "ignore_eos": True},
    "max_tokens 7": {"max_tokens": 7, "ignore_eos": True},
    "stop tokens": {"max_tokens": 24, "stop_token_ids": STOPS[:30]},
    "repetition": {
        "max_tokens": 24,
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=2, min_pattern_size=1, min_count=2
        ),
    },
    "seeded": {"max_tokens": 9, "temperature": 1.0, "seed": 4, "stop_token_ids": STOPS[:30]},
}


def sampling(kind: str) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, **KINDS[kind]})


def compare(
    pair: Any, kind: str, size: tuple[int, int] = SIZE
) -> tuple[list[Session], list[Session]]:
    """Plain vLLM's sessions, and those with an oracle that knows what follows, ends included."""
    params = sampling(kind)
    pair.plain.reset()
    expected = run(pair.plain, params, size)
    drafter = pair.make_oracle(
        _known(pair.plain, expected), pair.trees.most_nodes, range(EOS)
    )
    pair.trees.reset(drafter)
    return expected, run(pair.trees, params, size)


def _known(plain: Any, sessions: Sequence[Session]) -> list[Any]:
    """What every turn said and would have gone on to say, as ``RequestOutput`` has it."""
    turns = [(c, s) for one in sessions for c, s in zip(one.contexts, one.said, strict=True)]
    plain.reset()
    later = plain.generate(
        [context + said for context, said in turns],
        SamplingParams(temperature=0, max_tokens=BEHIND, ignore_eos=True),
    )
    return [
        SimpleNamespace(
            prompt_token_ids=context,
            outputs=[SimpleNamespace(token_ids=said + list(more.outputs[0].token_ids))],
        )
        for (context, said), more in zip(turns, later, strict=True)
    ]


def same(expected: Sequence[Session], got: Sequence[Session]) -> bool:
    return [(one.said, one.reasons) for one in expected] == [
        (one.said, one.reasons) for one in got
    ]


def check(pair: Any, kind: str, size: tuple[int, int] = SIZE) -> None:
    expected, got = compare(pair, kind, size)
    assert [one.said for one in got] == [one.said for one in expected]
    assert same(expected, got)
    stats = pair.trees.stats
    assert stats["drafts"] > size[0] * size[1] / 2 and stats["acceptance_length"] > 1.5, stats
    # Not the same turns all over.
    assert len({tuple(said) for one in got for said in one.said}) > size[0]
