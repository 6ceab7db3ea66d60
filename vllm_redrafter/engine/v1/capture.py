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
        # By request and position: a request that was preempted comes by the same positions again,
        # and a prompt in chunks by some from which nothing is sampled.
        self._rows: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def _keep_and_sample(self, grammar_output: Any) -> Any:
        step = self._runner.execute_model_state
        if step is not None:
            states = step.sample_hidden_states.cpu().clone()
            scheduled = step.scheduler_output.num_scheduled_tokens
            for name, row in zip(self._runner.input_batch.req_ids, states, strict=True):
                last = self._runner.requests[name].num_computed_tokens + scheduled[name] - 1
                self._rows[name][last] = row
        return self._sample_tokens(grammar_output)

    def take(self, outputs: list[Any]) -> Tensor:
        """The states behind all answers of `LLM.generate`, and forget everything.

        Returns:
            ``[A, H]`` in the target's type: of each answer in turn, per token the state from which
            it was sampled (that of the token before it).
        """
        # Inside the engine a request's name has a random suffix.
        rows = {name.rpartition("-")[0] or name: kept for name, kept in self._rows.items()}
        self._rows.clear()
        found = []
        for output in outputs:
            first = len(output.prompt_token_ids) - 1
            kept = rows[output.request_id]
            found += [kept[first + i] for i in range(len(output.outputs[0].token_ids))]
        return torch.stack(found)
