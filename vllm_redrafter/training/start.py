# SPDX-License-Identifier: Apache-2.0
"""Start from a finished drafter instead of from nothing: more data, other data, more blocks."""

from __future__ import annotations

from dataclasses import replace

from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.options import TrainOptions
from vllm_redrafter.training.target import Target


def load_start(options: TrainOptions, target: Target) -> Drafter | None:
    """The drafter that ``--init`` names, if the run can start from it.

    Raises:
        TrainingError: it was made for another target, or the options ask for another shape.
    """
    if options.init is None:
        return None
    where = f"the drafter in '{options.init}'"
    try:
        drafter = load_drafter(options.init, embedding=target.embedding, lm_head=target.head)
    except DrafterError as error:
        raise TrainingError(str(error)) from error
    config = drafter.config
    if config.vocab_size != target.vocab_size:
        raise TrainingError(
            f"{where} has vocab_size {config.vocab_size}, but the target has {target.vocab_size}; "
            "give --init a drafter of this target."
        )
    if not config.shared_head and options.head == "shared":
        raise TrainingError(
            f"{where} has a head of its own, which --head shared would throw away; give --head own."
        )
    if config.shared_head and options.head == "own":
        raise TrainingError(f"{where} shares the target's head; give --head shared or tuned.")
    if options.rnn != bool(config.rnn):
        raise TrainingError(
            f"{where} {'has a' if config.rnn else 'lacks the'} recurrent cell; give "
            f"{'--rnn' if config.rnn else '--no-rnn'}."
        )
    if options.exit_dim not in (None, config.exit_dim):
        raise TrainingError(
            f"--exit-dim is {options.exit_dim}, but {where} has {config.exit_dim}; leave it out."
        )
    if options.blocks is not None and options.blocks < config.num_draft_layers:
        raise TrainingError(
            f"--blocks is {options.blocks}, but {where} has {config.num_draft_layers}; give at "
            "least as many."
        )
    if not config.shared_head and options.draft_vocab_size not in (None, config.draft_vocab_size):
        raise TrainingError(
            f"--draft-vocab-size is {options.draft_vocab_size}, but the head of {where} has "
            f"{config.draft_vocab_size} rows; leave --draft-vocab-size out."
        )
    return drafter


def with_shape_of(options: TrainOptions, drafter: Drafter | None) -> TrainOptions:
    """The options, with what was not given taken from the drafter that the run starts from."""
    if drafter is None:
        return options
    config = drafter.config
    return replace(
        options,
        exit_dim=config.exit_dim,
        blocks=config.num_draft_layers if options.blocks is None else options.blocks,
        draft_vocab_size=options.draft_vocab_size or config.draft_vocab_size,
    )
