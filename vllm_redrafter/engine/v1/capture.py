# SPDX-License-Identifier: Apache-2.0
"""The target's hidden states, taken from a running engine instead of being computed again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class StateCapture:
    """Keeps the hidden state behind every token that an engine samples.

    The engine must run in this process on Model Runner V1, without speculative decoding: then each
    row that the head is given belongs to one request, the last of those that it had in the step.
    """

    def __init__(self, llm: Any) -> None:
        """Hang on to a ``vllm.LLM``."""
        [self._runner] = llm.collective_rpc(lambda worker: worker.model_runner)
        self._sample_tokens = self._runner.sample_tokens
        self._runner.sample_tokens = self._keep_and_sample
        # Request -> position -> number of the row: a request that was preempted comes by the same
        # positions again, and a prompt in chunks by some from which nothing is sampled.
        self._numbers: dict[str, dict[int, int]] = defaultdict(dict)
        self._rows = _Rows()

    def _keep_and_sample(self, grammar_output: Any) -> Any:
        step = self._runner.execute_model_state
        if step is not None:
            scheduled = step.scheduler_output.num_scheduled_tokens
            first = self._rows.add(step.sample_hidden_states)
            for number, name in enumerate(self._runner.input_batch.req_ids, first):
                last = self._runner.requests[name].num_computed_tokens + scheduled[name] - 1
                self._numbers[name][last] = number
        return self._sample_tokens(grammar_output)

    def take(self, outputs: list[Any]) -> Tensor:
        """The states behind all answers of `LLM.generate`, and forget everything.

        Returns:
            ``[A, H]`` in the target's type: of each answer in turn, per token the state from which
            it was sampled (that of the token before it).
        """
        # Inside the engine a request's name has a random suffix.
        numbers = {name.rpartition("-")[0] or name: kept for name, kept in self._numbers.items()}
        wanted = []
        for output in outputs:
            first = len(output.prompt_token_ids) - 1
            kept = numbers[output.request_id]
            wanted += [kept[first + i] for i in range(len(output.outputs[0].token_ids))]
        states = self._rows.all()[wanted]
        self._numbers.clear()
        self._rows = _Rows()
        return states


class _Rows:
    """Rows, in few large tensors: many small ones that live long leave the heap in pieces."""

    LARGE = 8192

    def __init__(self) -> None:
        self._large: list[Tensor] = []
        self._small: list[Tensor] = []
        self._count = 0

    def add(self, rows: Tensor) -> int:
        """Keep a copy of ``[n, H]``; returns the number of the first."""
        first = self._count
        self._count += len(rows)
        self._small.append(rows.to("cpu", copy=True))
        if sum(map(len, self._small)) >= self.LARGE:
            self._merge()
        return first

    def all(self) -> Tensor:
        self._merge()
        return torch.cat(self._large)

    def _merge(self) -> None:
        if self._small:
            self._large.append(torch.cat(self._small))
            self._small = []
