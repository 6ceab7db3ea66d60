# SPDX-License-Identifier: Apache-2.0
"""How ``method: redrafter`` passes vLLM's configuration when Model Runner V2 will run.

``SpeculativeConfig.method`` is a closed list, and ``custom_class``, which the V1 engine uses, makes
vLLM fall back to V1. ``draft_model`` does not, but wants a model that it can describe. So the
drafter's own directory is passed as that "draft model": its ``model_type`` gets a config class, and
the architecture a stub that vLLM may inspect and that is never built.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from vllm_redrafter.drafter.config import APPLE_MODEL_TYPE, MODEL_TYPE

ARCHITECTURE = "ReDrafterCarrier"


class CarrierConfig(PretrainedConfig):
    """What vLLM asks of a draft model's config; the rest of the drafter's is ours to read.

    Other keys of config.json are left out on purpose: transformers would take some (``top_k``) for
    settings of its own.
    """

    model_type = MODEL_TYPE

    def __init__(self, vocab_size: int = 1, hidden_size: int = 1, **_: Any) -> None:
        super().__init__(architectures=[ARCHITECTURE])
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        # A drafter has no attention; vLLM divides by these.
        self.num_hidden_layers = 1
        self.num_attention_heads = 1
        self.num_key_value_heads = 1


class AppleCarrierConfig(CarrierConfig):
    """The same for Apple's own checkpoints."""

    model_type = APPLE_MODEL_TYPE


class ReDrafterCarrier(nn.Module):
    """The interface by which vLLM recognises a text model; never built."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise RuntimeError("The carrier is a description; it is never built. This is a bug.")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        raise NotImplementedError


def register_carrier() -> None:
    """Make the carrier known to transformers and vLLM; only called for users who asked."""
    from vllm.model_executor.models.registry import ModelRegistry

    for config in (CarrierConfig, AppleCarrierConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, ReDrafterCarrier)
