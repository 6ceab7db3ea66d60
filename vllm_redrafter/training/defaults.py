# SPDX-License-Identifier: Apache-2.0
"""What `train` does where it is not told: a recipe by the size of the target.

What is known, and from where:

* hidden size 576 (SmolLM2-135M): measured here, at a learning rate of 1e-3 with 2 blocks. In 20
  minutes on one core, steps of 1,024 positions stood still and steps of 320 learnt. At that time
  the positions of a step came from few sequences, so larger steps deserve another try. One
  evaluation of a head of 8,192 rows takes a third of the time that the full one takes, or less.
* hidden size 4,096 (Vicuna 7B): learning rate and blocks are those of Apple's training script. They
  were not tried here.
* everything else, the batch sizes and draft vocabularies of larger targets included, is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_redrafter.training.options import TrainOptions


@dataclass(frozen=True)
class Recipe:
    """The options of `train` that follow the target's size.

    Attributes:
        batch_size: positions per step and process.
        lr: highest learning rate.
        blocks: residual blocks.
        draft_vocab_size: tokens that can be drafted.
    """

    batch_size: int
    lr: float
    blocks: int
    draft_vocab_size: int


def recipe(hidden_size: int) -> Recipe:
    """The defaults for a target of this hidden size."""
    # The head must cost little beside the target's own layers; those grow with hidden_size.
    if hidden_size < 1024:
        return Recipe(batch_size=320, lr=1e-3, blocks=2, draft_vocab_size=8192)
    if hidden_size < 3072:
        return Recipe(batch_size=512, lr=1e-3, blocks=2, draft_vocab_size=16384)
    return Recipe(batch_size=1024, lr=1e-3, blocks=2, draft_vocab_size=32768)


def resolve(options: TrainOptions, hidden_size: int, vocab_size: int) -> Recipe:
    """What was asked for, and the target's recipe for the rest; never more rows than tokens."""
    usual = recipe(hidden_size)
    size = options.draft_vocab_size or usual.draft_vocab_size
    return Recipe(
        batch_size=options.batch_size or usual.batch_size,
        lr=options.lr or usual.lr,
        blocks=usual.blocks if options.blocks is None else options.blocks,
        draft_vocab_size=min(size, vocab_size),
    )
