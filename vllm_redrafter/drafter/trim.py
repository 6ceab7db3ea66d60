# SPDX-License-Identifier: Apache-2.0
"""A smaller draft vocabulary for a drafter that has an output head of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.reading import one_line, shown


def trim_vocabulary(drafter: Drafter, ids: list[int]) -> Drafter:
    """A drafter that scores only the tokens ``ids``; its other tensors are shared, not copied.

    Raises:
        DrafterError: a drafter without a full head, or ids that are none, repeated or all.
    """
    config = drafter.config
    if drafter.draft_vocab is not None or config.shared_head:
        raise DrafterError(
            "The drafter has no full output head of its own, so its vocabulary cannot be trimmed."
        )
    if not ids or len(set(ids)) != len(ids) or len(ids) >= config.vocab_size:
        raise DrafterError(
            f"The draft vocabulary has {len(ids)} ids, {len(set(ids))} of them distinct; give "
            f"distinct ids, at least 1 and fewer than vocab_size {config.vocab_size}."
        )
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise DrafterError(f"Draft vocabulary ids must be from 0 to {config.vocab_size - 1}.")
    with torch.device("meta"):
        out = Drafter(replace(config, draft_vocab_size=len(ids), apple=False))
    rows = torch.tensor(ids, dtype=torch.int64)
    tensors = drafter.state_dict()
    head = f"lm_head.{config.num_draft_layers}.weight"
    out.load_state_dict({**tensors, head: tensors[head][rows]}, assign=True)
    out.draft_vocab, out.embedding = rows, drafter.embedding
    return out.requires_grad_(False).eval()


def read_integers(path: Path) -> list[int]:
    """One integer a line; raises DrafterError with the line's number where that is not so."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DrafterError(f"{path} cannot be read ({one_line(error)}).") from error
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(int(line))
        except ValueError as error:
            raise DrafterError(
                f"{path}, line {number}: {shown(line)} is not an integer."
            ) from error
    return values
