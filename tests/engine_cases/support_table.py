# SPDX-License-Identifier: Apache-2.0
"""What every parameter and every family of targets gets, by model runner: data alone.

``docs/support.md`` shows these tables, and tests run them: ``support_parameters`` asks both engines
for every parameter, ``engine_errors/test_target_shape.py`` and the tests named in ``FAMILIES`` hold
every family.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TREE, CHAIN, NO_DRAFT, REFUSED = "tree", "chain", "no draft", "refused"


class Parameter(NamedTuple):
    """One parameter of a request.

    Attributes:
        fields: of ``SamplingParams`` that turn it on.
        v1: what is drafted for such a request on Model Runner V1.
        v2: on V2.
    """

    fields: dict[str, Any]
    v1: str = TREE
    v2: str = TREE


_SEEDED = {"temperature": 1.0, "seed": 1}

PARAMETERS: dict[str, Parameter] = {
    "temperature": Parameter(_SEEDED | {"temperature": 0.5}),
    "top_p": Parameter(_SEEDED | {"top_p": 0.8}),
    "top_k": Parameter(_SEEDED | {"top_k": 5}),
    "min_p": Parameter(_SEEDED | {"min_p": 0.1}),
    "seed": Parameter(_SEEDED),
    "n": Parameter(_SEEDED | {"n": 2}),
    "logit_bias": Parameter({"logit_bias": {7: 2.0}}),
    "allowed_token_ids": Parameter({"allowed_token_ids": list(range(20, 60))}),
    "stop": Parameter({"stop": ["xy"]}),
    "stop_token_ids": Parameter({"stop_token_ids": [1]}),
    "ignore_eos": Parameter({"ignore_eos": True}),
    "min_tokens": Parameter({"min_tokens": 6}),
    "logprobs": Parameter({"logprobs": 2}),
    "logprob_token_ids": Parameter({"logprob_token_ids": [1]}),
    "prompt_logprobs": Parameter({"prompt_logprobs": 2}),
    "presence_penalty": Parameter({"presence_penalty": 1.0}, v2=CHAIN),
    "frequency_penalty": Parameter({"frequency_penalty": 1.0}, v2=CHAIN),
    "repetition_penalty": Parameter({"repetition_penalty": 1.5}, v2=CHAIN),
    "bad_words": Parameter({"bad_words": ["x"]}, v2=CHAIN),
    "repetition_detection": Parameter(
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 4}}, v2=NO_DRAFT
    ),
    "structured_outputs": Parameter(
        {"structured_outputs": {"regex": "[a-p]{14}"}}, v1=TREE, v2=CHAIN
    ),
    "thinking_token_budget": Parameter({"thinking_token_budget": 4}, v1=NO_DRAFT, v2=NO_DRAFT),
}


class Kind(NamedTuple):
    """Requests that something else than ``SamplingParams`` makes special.

    Attributes:
        v1, v2: as of ``Parameter``.
        held_by: the tests.
    """

    v1: str
    v2: str
    held_by: str


_OF_REQUESTS = "`engine_v1/test_parameters.py`, `engine_v2/own_process/v2_parameters.py`"

KINDS: dict[str, Kind] = {
    "LoRA adapters": Kind(TREE, TREE, _OF_REQUESTS),
    "custom logits processors": Kind(NO_DRAFT, CHAIN, _OF_REQUESTS),
    "prompt embeddings": Kind(
        TREE, TREE, "`engine_v1/test_undrafted.py`, `engine_v2/own_process/v2_undrafted.py`"
    ),
    "streamed input": Kind(
        TREE, TREE, "`engine_v1/test_async_sessions.py`, `engine_v2/own_process/v2_sessions.py`"
    ),
}


class Target(NamedTuple):
    """One family of targets, by its ``model_type``.

    Attributes:
        cpu: what it gets on Model Runner V1, which runs on CPUs.
        cuda: on V2, which runs on GPUs.
        compared: runners on which answers were compared with plain vLLM's, and by which tests.
        fields: of its config.json that make it what it is.
    """

    cpu: str
    cuda: str
    compared: str
    fields: dict[str, Any] = {}


_WINDOWS_V1 = "V1 (`engine_v1/test_windows.py`)"
_WINDOWS = f"{_WINDOWS_V1}, V2 (`engine_v2/own_process/v2_windows.py`)"
_SCALED = "V1 (`engine_v1/test_targets.py`), V2 (`engine_v2/own_process/v2_targets.py`)"
_CHAINS = "V1 (`engine_v1/test_chains.py`)"
_STATES = "V2 (`engine_v2/own_process/v2_chains.py`)"

TARGETS: dict[str, Target] = {
    "llama": Target(TREE, TREE, "V1, V2 (nearly every test)"),
    "mistral": Target(TREE, TREE, _WINDOWS),
    "gemma2": Target(TREE, TREE, _WINDOWS),
    "gemma3_text": Target(TREE, TREE, _WINDOWS_V1),
    "gpt_oss": Target(TREE, TREE, _WINDOWS_V1),
    "exaone4": Target(TREE, TREE, _WINDOWS_V1),
    "cohere2": Target(TREE, TREE, _WINDOWS_V1),
    "olmo3": Target(TREE, TREE, _WINDOWS_V1),
    "gemma": Target(TREE, TREE, _SCALED),
    "granite": Target(TREE, TREE, _SCALED),
    "cohere": Target(TREE, TREE, _SCALED),
    "deepseek_v3": Target(CHAIN, REFUSED, _CHAINS),
    "qwen3_next": Target(REFUSED, REFUSED, ""),
    "falcon_h1": Target(REFUSED, CHAIN, _STATES),
    "granitemoehybrid": Target(REFUSED, CHAIN, "", {"layer_types": ["mamba", "attention"]}),
    "mamba2": Target(REFUSED, CHAIN, ""),
    "lfm2": Target(REFUSED, REFUSED, "", {"layer_types": ["conv", "full_attention"]}),
    "mamba": Target(REFUSED, REFUSED, ""),
    "jamba": Target(REFUSED, REFUSED, ""),
    "minimax": Target(
        REFUSED, REFUSED, "", {"layer_types": ["linear_attention", "full_attention"]}
    ),
    "bart": Target(REFUSED, REFUSED, ""),
}  # fmt: skip
