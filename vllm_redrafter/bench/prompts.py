# SPDX-License-Identifier: Apache-2.0
"""What is asked: sets of prompts by name, or the prompts of a file, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_redrafter.bench.errors import BenchError
from vllm_redrafter.bench.models import Target
from vllm_redrafter.demo.prompts import TEXTS, random_token_ids, spread
from vllm_redrafter.training.prompts import ChatTokens, read_prompts

RANDOM = "random"
RANDOM_LENGTH, RANDOM_TEMPERATURE = 64, 1.5
SETS = (*TEXTS, RANDOM)


@dataclass(frozen=True)
class PromptSet:
    """Some prompts that are reported together.

    Attributes:
        token_ids: of each prompt, chat template applied.
        categories: of each prompt; [] where there are none.
        temperature: above 0 each prompt is sampled with a seed of its own.
        ignore_eos: random text ends anywhere; engines that are compared must do the same work.
        remarks: sentences about prompts that were left out.
    """

    name: str
    token_ids: list[list[int]]
    categories: list[str] = field(default_factory=list)
    temperature: float = 0.0
    ignore_eos: bool = False
    remarks: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.token_ids))


def load_sets(
    names: Sequence[str], file: Path | None, count: int, target: Target, raw: bool = False
) -> list[PromptSet]:
    """The first ``count`` prompts of every set.

    Args:
        names: of `SETS`; not looked at when there is a ``file``.
        file: JSON lines as `vllm-redrafter data` reads them.
        raw: prompts are continued as plain text, without a chat template.

    Raises:
        FetchError: a set could not be downloaded.
        TrainingError: an unreadable file, a target without a tokenizer or chat template.
    """
    if file is not None:
        return [_from_file(file, count, target, raw)]
    return [_named(name, count, target, raw) for name in dict.fromkeys(names)]


def that_fit(asked: PromptSet, max_tokens: int, context: int | None) -> PromptSet:
    """The prompts that the target has room for, with their answers; a remark counts the others.

    Args:
        context: the target's longest sequence; None where its config does not say it.

    Raises:
        BenchError: no prompt is left.
    """
    fit = [i for i, ids in enumerate(asked.token_ids)
           if context is None or len(ids) + max_tokens <= context]  # fmt: skip
    if not fit:
        raise BenchError(
            f"no prompt of {asked.name} fits with an answer of {max_tokens} tokens into the "
            f"target's {context}; give shorter prompts or a smaller --max-tokens."
        )
    if len(fit) == len(asked.token_ids):
        return asked
    left_out = len(asked.token_ids) - len(fit)
    return replace(
        asked,
        token_ids=[asked.token_ids[i] for i in fit],
        categories=[asked.categories[i] for i in fit] if asked.categories else [],
        remarks=[*asked.remarks, f"{left_out} prompts of {asked.name} were left out: with their "
                 f"answers they are longer than the target's {context} tokens."],
    )  # fmt: skip


def _named(name: str, count: int, target: Target, raw: bool) -> PromptSet:
    if name == RANDOM:
        ids = random_token_ids(count, RANDOM_LENGTH, target.config["vocab_size"])
        return PromptSet(name, ids, temperature=RANDOM_TEMPERATURE, ignore_eos=True)
    asked = spread(TEXTS[name](), count)
    tokens = ChatTokens(target.files, raw)
    ids = [tokens.encode([{"role": "user", "content": prompt.turns[0]}]) for prompt in asked]
    return PromptSet(name, ids, [prompt.category for prompt in asked])


def _from_file(file: Path, count: int, target: Target, raw: bool) -> PromptSet:
    found = read_prompts(file, count)
    tokens = ChatTokens(target.files, raw)
    ids = [tokens.encode(conversation) for conversation in found.conversations]
    remarks = [f"--prompts {file}, {line}; the line was left out." for line in found.broken]
    return PromptSet(file.stem, ids, remarks=remarks)
