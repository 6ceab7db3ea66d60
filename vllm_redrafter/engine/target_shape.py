# SPDX-License-Identifier: Apache-2.0
"""Which of three a target gets: trees, chains, or a refusal; and why.

A tree needs attention of which every row may be told what it sees, and KV that can be moved. Layers
that are computed as a recurrence have neither, nor has MLA in our kernels. There the best chain of
the draft is verified as vLLM verifies its own chains, where it has such a path.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_redrafter.engine.checks import UnsupportedError

# Our key in vLLM's additional_config.
SHAPE_KEY = "redrafter_shape"


class Shape(enum.Enum):
    """What is verified for a target."""

    TREE = "tree"
    CHAIN = "chain"
    REFUSED = "refused"


@dataclass(frozen=True)
class TargetShape:
    """What a target gets.

    Attributes:
        shape: see ``Shape``.
        why: a clause; of a refusal the whole sentence; empty for a tree.
        keeps_states: layers keep a state per drafted token, so that every node costs memory.
    """

    shape: Shape
    why: str = ""
    keeps_states: bool = False

    def __str__(self) -> str:
        """What stands behind "gets"."""
        what = {Shape.TREE: "trees", Shape.CHAIN: "chains", Shape.REFUSED: "a refusal"}[self.shape]
        return f"{what} ({self.why})" if self.why else what


class Recurrence(enum.Enum):
    """Kinds of recurrent layers, by vLLM's names of their metadata; and how users know them."""

    GDN = "gated delta net layers"
    MAMBA1 = "Mamba 1 layers"
    MAMBA2 = "Mamba 2 layers"
    SHORT_CONV = "short convolutions"
    LINEAR = "lightning attention layers"
    UNKNOWN = "recurrent layers"


# In ``layer_types`` of a config.json.
NAMES_OF_RECURRENCE = frozenset(("linear_attention", "mamba", "conv", "recurrent"))


def recurrence_of(model: Any) -> Recurrence | None:
    """The kind of recurrent layers that a target has, by its config.json; None for none.

    Args:
        model: vLLM's ``ModelConfig``.
    """
    config = model.hf_text_config
    kinds = set(getattr(config, "layer_types", None) or ())
    # Of an architecture that vLLM leaves to transformers it does not know what its layers are.
    if not (model.is_hybrid or model.is_attention_free or kinds & NAMES_OF_RECURRENCE):
        return None

    def has(*names: str) -> bool:
        return all(getattr(config, name, None) is not None for name in names)

    if has("linear_num_value_heads"):
        return Recurrence.GDN
    if has("conv_L_cache"):
        return Recurrence.SHORT_CONV
    if has("num_heads", "state_size"):
        return Recurrence.MAMBA2
    if has("time_step_rank") or has("mamba_dt_rank"):
        return Recurrence.MAMBA1
    heads = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    if any(map(has, heads)):
        return Recurrence.MAMBA2
    # Last: transformers gives Mamba's layers this name too.
    if "linear_attention" in kinds:
        return Recurrence.LINEAR
    return Recurrence.UNKNOWN


# Kinds for which vLLM keeps a state for every drafted token and goes on from the last accepted
# one's. On CPUs it does for none: with drafts of vLLM's own, n-grams, Mamba 2 gives other answers
# there, and a gated delta net ends the engine (0.32.0).
KEEP_STATES: dict[bool, tuple[Recurrence, ...]] = {
    True: (),
    False: (Recurrence.GDN, Recurrence.MAMBA2, Recurrence.SHORT_CONV),
}

# Of these no answers on V2 were held against plain vLLM's; MLA's chains differed in the harness.
NOT_COMPARED = (Recurrence.GDN, Recurrence.SHORT_CONV)

# vLLM's own reasons, where it does not.
_NO_COUNT = "take no number of accepted tokens, and go on from the state behind a rejected one"
_FEWER_ROWS = "fail where a step has fewer rows than the one before accepted tokens"

def shape_of_model(model: Any, cpu: bool) -> TargetShape:
    """What a target gets, by its configuration alone; a refusal's ``why`` is the whole sentence.

    Args:
        model: vLLM's ``ModelConfig``.
        cpu: on vLLM's CPU platform, else on CUDA.
    """
    try:
        return check_target(model, cpu)
    except UnsupportedError as error:
        return TargetShape(Shape.REFUSED, str(error))


def check_target(model: Any, cpu: bool) -> TargetShape:
    """The same.

    Raises:
        UnsupportedError: the target is refused.
    """
    name = ", ".join(model.architectures)
    if model.runner_type != "generate":
        raise UnsupportedError(
            f"ReDrafter drafts for text generation, not for runner '{model.runner_type}'; leave "
            "it out for this model."
        )
    if model.is_encoder_decoder:
        raise UnsupportedError(
            f"ReDrafter does not support encoder-decoder models ({name}); use a decoder-only "
            "target."
        )
    if model.uses_mrope or getattr(model, "uses_xdrope_dim", 0):
        raise UnsupportedError(
            f"ReDrafter does not support multi-dimensional rotary positions ({name}); use a target "
            "with one position per token."
        )
    # Llama 4. A context within the first chunk is attended to in full.
    chunk = model.attention_chunk_size
    if chunk and model.max_model_len > chunk:
        raise UnsupportedError(
            f"ReDrafter does not support chunked local attention ({name}) over contexts of more "
            f"than one chunk, and max_model_len is {model.max_model_len}; set it to {chunk} or "
            "less."
        )
    kind = recurrence_of(model)
    if kind is not None and kind not in KEEP_STATES[cpu]:
        raise UnsupportedError(
            f"ReDrafter does not support {kind.value} ({name}) on {'CPUs' if cpu else 'GPUs'}, "
            "because vLLM cannot verify drafts of them: its kernels there "
            f"{_FEWER_ROWS if kind is Recurrence.GDN else _NO_COUNT}; use a decoder-only target "
            "with full or sliding-window attention in every layer."
        )
    if not cpu and (model.use_mla or kind in NOT_COMPARED):
        raise UnsupportedError(
            f"ReDrafter does not support {kind.value if kind is not None else 'MLA'} ({name}) on "
            "GPUs yet, where its chains were not held against plain vLLM's answers; use a "
            "decoder-only target with full or sliding-window attention in every layer."
        )
    if kind is not None:
        why = f"{kind.value} are a recurrence along one sequence"
        return TargetShape(Shape.CHAIN, why, keeps_states=True)
    if model.use_mla:
        return TargetShape(Shape.CHAIN, "MLA's kernels take no tree")
    return TargetShape(Shape.TREE)


def check_states(kv_cache_groups: Sequence[Any], cpu: bool) -> None:
    """The layers are there: whether all recurrent ones are of a kind that goes back.

    Args:
        kv_cache_groups: vLLM's ``KVCacheGroupSpec``s.
        cpu: see ``shape_of_model``.

    Raises:
        UnsupportedError: another kind.
    """
    allowed = {kind.name for kind in KEEP_STATES[cpu]}
    for group in kv_cache_groups:
        kind = getattr(group.kv_cache_spec, "mamba_type", None)
        if kind is not None and kind.name.removesuffix("_ATTN") not in allowed:
            raise UnsupportedError(
                f"ReDrafter does not support layers of vLLM's kind {kind.name}, whose state cannot "
                "go back behind a rejected token; use a decoder-only target with full or "
                "sliding-window attention in every layer."
            )


def put_shape(vllm_config: Any, shape: TargetShape) -> None:
    """Let the workers know."""
    vllm_config.additional_config[SHAPE_KEY] = [shape.shape.value, shape.why, shape.keeps_states]


def shape_of(vllm_config: Any) -> TargetShape:
    """What ``put_shape`` put there; trees where nobody did."""
    value, why, keeps_states = (vllm_config.additional_config or {}).get(
        SHAPE_KEY, [Shape.TREE.value, "", False]
    )
    return TargetShape(Shape(value), why, keeps_states)
