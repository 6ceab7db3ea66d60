# SPDX-License-Identifier: Apache-2.0
"""Whether the target is the one that the drafter was made for, by the drafter's fingerprint of it.

In two parts: layers and tokenizer before the engine starts, tables when they are loaded. A drafter
without a fingerprint, as Apple's, passes.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.drafter.fingerprint import (
    MOST_DIFFERENCE,
    Fingerprint,
    difference,
    sample,
    vocab_sha256,
)
from vllm_redrafter.engine.first_rank import is_first_rank
from vllm_redrafter.options import ReDrafterOptions

logger = logging.getLogger("vllm.vllm_redrafter")


def check_description(
    fingerprint: Fingerprint | None, options: ReDrafterOptions, model_config: Any
) -> None:
    """Compare the number of layers and the tokenizer, as far as both are known.

    Args:
        model_config: vLLM's ``ModelConfig`` of the target.

    Raises:
        DrafterError: another target, and ``fail_on_target_mismatch``.
    """
    if fingerprint is None:
        logger.debug("The drafter in '%s' has no fingerprint of its target.", options.model)
        return
    layers = getattr(model_config.hf_text_config, "num_hidden_layers", None)
    if None not in (layers, fingerprint.num_hidden_layers) and (
        layers != fingerprint.num_hidden_layers
    ):
        _another_target(
            options, f"one of {fingerprint.num_hidden_layers} layers, and this has {layers}"
        )
        return
    tokenizer = _tokenizer_sha256(model_config)
    if None not in (tokenizer, fingerprint.tokenizer_sha256) and (
        tokenizer != fingerprint.tokenizer_sha256
    ):
        _another_target(options, "one with another tokenizer")


def check_tables(
    fingerprint: Fingerprint | None, options: ReDrafterOptions, embedding: Any, head: Any
) -> None:
    """Compare sampled values of the target's input embedding and output head.

    With tensor parallelism all ranks must call this together; they all come to the same result.

    Args:
        embedding, head: as ``target_tables`` gives them.

    Raises:
        DrafterError: another target, and ``fail_on_target_mismatch``.
    """
    if fingerprint is None:
        return
    sizes = fingerprint.vocab_size, fingerprint.hidden_size
    known = {"input embedding": fingerprint.embedding, "output head": fingerprint.head}
    found = {"input embedding": sample(embedding, *sizes), "output head": sample(head, *sizes)}
    apart = {name: difference(known[name], found[name]) for name in known}
    logger.debug("Differences from the drafter's fingerprint of its target: %s", apart)
    worst = max(apart, key=apart.__getitem__)
    if apart[worst] > MOST_DIFFERENCE:
        _another_target(
            options,
            f"one whose {worst} is another (sampled values differ by {apart[worst]:.2f}; the same "
            f"target's by less than {MOST_DIFFERENCE}, unrelated ones by about 0.7)",
            say=is_first_rank(),
        )


def _another_target(options: ReDrafterOptions, how: str, say: bool = True) -> None:
    """Raise or, if ``say``, warn."""
    message = (
        f"The drafter in '{options.model}' was not made for this target, but for {how}: use a "
        "drafter that was trained for this target"
    )
    if options.fail_on_target_mismatch:
        raise DrafterError(f"{message}, or leave out fail_on_target_mismatch.")
    if say:
        logger.warning("%s; hardly any of its drafts will be accepted.", message)


def _tokenizer_sha256(model_config: Any) -> str | None:
    """Of the tokenizer that vLLM has, or will have; None where there is none to compare."""
    from transformers import PreTrainedTokenizerBase
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        tokenizer = cached_tokenizer_from_config(model_config)
        # Another library's may count other pieces of the same vocabulary.
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return None
        return vocab_sha256(tokenizer.get_vocab())
    except Exception as error:  # the engine says it in its own words, where it needs a tokenizer
        logger.debug("The target's tokenizer was not compared: %s", error)
        return None
