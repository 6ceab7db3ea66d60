# SPDX-License-Identifier: Apache-2.0
"""Every parameter of ``support_table`` in one batch: equal to plain vLLM, drafted for as said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine_v1.tiny_target import prompts
from vllm.sampling_params import RepetitionDetectionParams

from engine_cases.cases import IDS, LETTERS
from engine_cases.reasoning import END
from engine_cases.run import sampling_params
from engine_cases.support_table import CHAIN, NO_DRAFT, PARAMETERS, TREE

ORDER = (NO_DRAFT, CHAIN, TREE)


def note(most: dict[tuple[int, ...], str], prompt: Sequence[int], is_chain: bool) -> None:
    """A draft of at least one node was verified, or will be, for the request with this prompt."""
    shape = CHAIN if is_chain else TREE
    most[tuple(prompt)] = max(most.get(tuple(prompt), NO_DRAFT), shape, key=ORDER.index)


def ask(pair: Any, most: dict[tuple[int, ...], str], tokens: int) -> dict[str, str]:
    """What every parameter's request had drafted; answers are compared.

    Args:
        pair: of engines with ``reasoning.settings()``.
        most: filled by ``note``, which an engine's test has called for every draft.
        tokens: of each request.
    """
    params = []
    for parameter in PARAMETERS.values():
        fields = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **parameter.fields}
        if "repetition_detection" in fields:
            fields["repetition_detection"] = RepetitionDetectionParams(
                **fields["repetition_detection"]
            )
        params.append(sampling_params(fields))
    batch = prompts(len(params), shortest=8)
    # A grammar has no say in a reasoning section, which without this lasts to the end.
    at = list(PARAMETERS).index("structured_outputs")
    batch[at] = [*batch[at], IDS.index(END)]
    # Letters, so that a grammar lets some of what is drafted pass.
    run = pair.run(batch, params, chain_first=True, vocab=LETTERS, empty=0, chains=0)
    run.assert_equal()
    found = {}
    for name, output in zip(PARAMETERS, run.got, strict=True):
        found[name] = most.get(tuple(output.prompt_token_ids), NO_DRAFT)
    return found
