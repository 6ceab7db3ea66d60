# SPDX-License-Identifier: Apache-2.0
"""Whether a difference between two servers is one of rounding: the rule of tests/sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sweep.run import Sweep, first_difference

from hostile.load import Answer, Request

# Of the body, what is not a sampling parameter.
OTHER_FIELDS = ("model", "prompt", "return_token_ids", "stream")


def sampling_parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``SamplingParams`` for the body of a completion."""
    from vllm.sampling_params import StructuredOutputsParams

    params = {name: value for name, value in body.items() if name not in OTHER_FIELDS}
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    return params


def is_tie(target: Path, request: Request, plain: Answer, ours: Answer) -> bool:
    """Whether plain vLLM says all that ours said once noise of rounding's size is on its logits.

    Args:
        target: directory of the target, which starts an engine in this process.
    """
    if plain.status != 200 or ours.status != 200 or len(plain.choices) != len(ours.choices):
        return False
    body = json.loads(request.body)
    if not isinstance(body["prompt"], list):
        return False
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    params, sweep = sampling_parameters(body), Sweep(target, target)
    for place, (want, have) in enumerate(zip(plain.choices, ours.choices, strict=True)):
        # All choices of the first prompt, then those of the next.
        prompt, index = divmod(place, len(plain.choices) // len(prompts))
        asked = {"prompt": prompts[prompt], "params": params}
        at = first_difference(want[0], have[0])
        if want != have and not sweep.is_tie(asked, index, at, have[0]):
            return False
    return True
