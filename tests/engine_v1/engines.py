# SPDX-License-Identifier: Apache-2.0
"""In-process engines, plain and with ReDrafter, shared by all tests of a session."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

from engine_cases.kept import end_together

from engine_v1.oracle import Oracle
from engine_v1.tiny_target import EOS
from vllm_redrafter.engine.metrics import ReDrafterStats


@dataclass(repr=False)
class Engine:
    """One ``LLM``, with a view of what its scheduler and runner did.

    Attributes:
        emitted: tokens of every walk, as (request id, tokens), since ``reset``.
        cut: drafts of which the scheduler took only a part.
        mixed_steps: steps in which trees ran beside rows that vLLM's kernel had to compute.
        preemptions: since ``reset``.
    """

    llm: Any
    emitted: list[tuple[str, list[int]]] = field(default_factory=list)
    cut: int = 0
    mixed_steps: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.verifies_trees = hasattr(self.runner, "redrafter_stats")
        self.drafts_itself = getattr(self.runner, "_draft_trees", None)
        self._watch(self.scheduler, "_preempt_request", self._count_preemption)
        if self.verifies_trees:
            # In a test an error of drafting is a failure.
            self.guarded = self.runner.draft_guard.serving
            self.runner.draft_guard.serving = False
            self._watch(self.runner, "_tree_to_verify", self._count_cut)
            self._watch(self.runner, "_tree_step", self._count_mixed)
            self._watch(self.runner, "_move_accepted", self._note_emitted)

    def _watch(self, owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self._stored(*args) if name == "_tree_to_verify" else None
            result = original(*args, **kwargs)
            note(result, before, *args)
            return result

        setattr(owner, name, watched)

    def _stored(self, req_id: str, scheduled: Any) -> Any:
        return self.runner._trees.get(req_id)

    def _count_preemption(self, *_: Any) -> None:
        self.preemptions += 1

    def _count_cut(self, verified: Any, stored: Any, *_: Any) -> None:
        self.cut += bool(verified and stored and len(verified) < len(stored))

    def _count_mixed(self, step: Any, *_: Any) -> None:
        self.mixed_steps += not step.covers_all

    def _note_emitted(self, _result: Any, _before: Any, step: Any) -> None:
        for req_id, tokens in zip(self.runner.input_batch.req_ids, step.walk.tokens, strict=True):
            self.emitted.append((req_id, tokens))

    @property
    def most_nodes(self) -> int:
        return self.runner.num_spec_tokens

    @property
    def stats(self) -> dict[str, Any]:
        return self.runner.redrafter_stats.summary()

    def reset(self, drafter: Callable[..., Any] | None = None, prefixes: bool = True) -> None:
        """Forget counters and cached prefixes.

        Args:
            drafter: called in place of ``_draft_trees``, as ``Oracle`` is; None for the engine's.
            prefixes: False keeps the cached ones.
        """
        self.emitted, self.cut, self.mixed_steps, self.preemptions = [], 0, 0, 0
        if prefixes:
            assert self.llm.reset_prefix_cache()
        if not self.verifies_trees:
            return
        self.runner.redrafter_stats = ReDrafterStats()
        self.runner._draft_trees = (
            self.drafts_itself if drafter is None else types.MethodType(drafter, self.runner)
        )

    def generate(self, prompts: Sequence[Any], params: Any, **more: Any) -> list[Any]:
        """Finished outputs, in the order of the prompts: token ids, or what ``LLM`` takes."""
        return self.llm.generate(as_requests(prompts), params, use_tqdm=False, **more)


# Destroying one engine tears down the process groups that all of them share: none ever is.
_ENGINES: dict[tuple[tuple[str, str], ...], Engine] = {}
end_together(_ENGINES)


def engine(model: Any, drafter: Any = None, **settings: Any) -> Engine:
    """The engine with these settings, started at the first call.

    Args:
        model: directory of the target.
        drafter: directory of a drafter, or None for plain vLLM.
        settings: of ``LLM``; ``spec_*`` go into its speculative_config.
    """
    spec = {key[5:]: settings.pop(key) for key in list(settings) if key.startswith("spec_")}
    settings = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 128,
        "seed": 0,
    } | settings
    if drafter is not None:
        # A measured budget would give other trees at every run.
        fixed = {"method": "redrafter", "model": str(drafter), "node_budget": "fixed"}
        settings["speculative_config"] = fixed | spec
        settings.setdefault("per_request_spec_decode_metrics", "detailed")
    key = tuple(sorted((name, repr(value)) for name, value in settings.items()))
    if key not in _ENGINES:
        from vllm import LLM

        # In this process, where the runner can be reached; vLLM keeps the value it saw first.
        with mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
            _ENGINES[key] = Engine(LLM(**settings))
    return _ENGINES[key]


@dataclass(frozen=True)
class Pair:
    """Plain vLLM and ReDrafter with the same settings."""

    plain: Engine
    trees: Engine
    make_oracle: ClassVar[type[Oracle]] = Oracle

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Any,
        *,
        seed: int = 0,
        vocab: Sequence[int] = range(EOS),
        answers: Sequence[Any] | None = None,
        prefixes: bool = True,
        more: dict[str, Any] | None = None,
        **oracle: Any,
    ) -> Comparison:
        """Plain first, then with an oracle that knows plain's answers, or other ones.

        Args:
            prefixes: both forget cached prefixes first.
            more: of ``LLM.generate``.
        """
        more = more or {}
        self.plain.reset(prefixes=prefixes)
        expected = self.plain.generate(prompts, params, **more)
        known = expected if answers is None else answers
        drafter = self.make_oracle(known, self.trees.most_nodes, vocab, seed=seed, **oracle)
        self.trees.reset(drafter, prefixes=prefixes)
        return Comparison(self, drafter, expected, self.trees.generate(prompts, params, **more))


@dataclass(frozen=True)
class Comparison:
    """Outputs of both engines."""

    pair: Pair
    oracle: Oracle
    expected: list[Any]
    got: list[Any]

    @property
    def equal(self) -> bool:
        return answers(self.got) == answers(self.expected)

    def assert_equal(self) -> None:
        """Tokens, reasons to finish and stop tokens are plain vLLM's."""
        got, expected = answers(self.got), answers(self.expected)
        # In words, for pytest rewrites no assertion here; what differs only, for it would be cut.
        differ = [
            f"request {request}: {ours}, plain {plain}"
            for request, (ours, plain) in enumerate(zip(got, expected, strict=True))
            if ours != plain
        ]
        assert not differ, "\n".join(differ)
        assert self.oracle.unknown == 0
        assert not self.pair.trees.stats["draft_errors"]

    def assert_saw_trees(self, moves: int = 20, accepted: float = 1.0) -> None:
        """The run exercised what it is about: other branches than the first, of some depth."""
        stats = self.pair.trees.stats
        assert stats["moves"] >= moves, stats
        assert stats["acceptance_length"] >= 1 + accepted, stats


def as_requests(prompts: Sequence[Any]) -> list[Any]:
    return [
        prompt if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)}
        for prompt in prompts
    ]


def answers(outputs: Sequence[Any]) -> list[list[tuple[list[int], Any, Any]]]:
    """(tokens, finish reason, stop reason) of every completion of every request."""
    return [
        [(list(c.token_ids), c.finish_reason, c.stop_reason) for c in output.outputs]
        for output in outputs
    ]


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """Tokens of the first completion of every request."""
    return [list(output.outputs[0].token_ids) for output in outputs]
