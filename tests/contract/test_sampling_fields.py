# SPDX-License-Identifier: Apache-2.0
"""Every field of vLLM's SamplingParams is known, and what a request with it may have drafted.

The fields that matter have cases on both runners (``engine_cases``) and requests through a server
(``serving/test_parameters.py``). A field that a new vLLM adds fails here until somebody has looked.
"""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from vllm_redrafter.engine.v2.fallback import shape_of_request
from vllm_redrafter.engine.v2.tree_store import Shape

# With a value that turns the feature on, and the shape on Model Runner V2. On V1, whose processors
# see a row per request, all but the last two have trees.
DRAFTED = {
    "temperature": (0.5, Shape.TREE),
    "top_p": (0.5, Shape.TREE),
    "top_k": (5, Shape.TREE),
    "min_p": (0.1, Shape.TREE),
    "seed": (1, Shape.TREE),
    "logit_bias": ({1: 2.0}, Shape.TREE),
    "allowed_token_ids": ([1, 2], Shape.TREE),
    "stop": (["x"], Shape.TREE),
    "stop_token_ids": ([1], Shape.TREE),
    "ignore_eos": (True, Shape.TREE),
    "min_tokens": (3, Shape.TREE),
    "logprobs": (2, Shape.TREE),
    "logprob_token_ids": ([1], Shape.TREE),
    "prompt_logprobs": (2, Shape.TREE),
    "presence_penalty": (1.0, Shape.CHAIN),
    "frequency_penalty": (1.0, Shape.CHAIN),
    "repetition_penalty": (1.5, Shape.CHAIN),
    "bad_words": (["x"], Shape.CHAIN),
    "structured_outputs": (SimpleNamespace(regex="x"), Shape.CHAIN),
    "thinking_token_budget": (3, Shape.NOTHING),
}

# Of the front end or the scheduler alone, which see the same tokens; `extra_args` are for custom
# logits processors, which say themselves whether they change a request.
ELSEWHERE = {
    "n", "max_tokens", "flat_logprobs", "detokenize", "skip_special_tokens", "output_kind",
    "spaces_between_special_tokens", "include_stop_str_in_output", "stream_interval",
    "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache", "extra_args",
    "repetition_detection", "routed_experts_prompt_start", "prompt_logprob_token_ids",
    "prompt_logprob_start", "_eos_token_id", "_all_stop_token_ids", "_bad_words_token_ids",
}  # fmt: skip

# Of engines that ReDrafter refuses to start, or that vLLM refuses beside speculation.
OF_OTHER_ENGINES = {"trace_decode_token_ids", "watermarking", "_watermarking_skipped"}


def test_every_field_is_known():
    known = {*DRAFTED, *ELSEWHERE, *OF_OTHER_ENGINES}
    assert known == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("field", DRAFTED)
def test_what_is_drafted_on_v2(field):
    value, shape = DRAFTED[field]
    params = SamplingParams()
    setattr(params, field, value)
    request = SimpleNamespace(sampling_params=params, lora_request=None, prompt_embeds=None)
    assert shape_of_request(request)[0] is shape
