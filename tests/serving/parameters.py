# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter as a client gives it, and a server that takes them all."""

import json
import random
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MARKS = {"reasoning_start_str": "<", "reasoning_end_str": ">"}
START, END = 27, 29  # their tokens

# What a target's own generation_config.json may say for whoever does not ask.
DEFAULTS = {"min_p": 0.05}

PARAMETERS = {
    "nothing": {},
    "min_p": {"min_p": 0.3},
    "logit_bias": {"logit_bias": {"7": 30.0, "9": 30.0, "11": -100.0}},
    "both": {"min_p": 0.1, "logit_bias": {str(token): 4.0 for token in range(20, 60)}},
    "custom processor": {"vllm_xargs": {"lean": 12.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(40, 90))},
    "bad_words": {"bad_words": ["a", "b", "ab", "t"]},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "min_tokens": {"stop_token_ids": list(range(0, 250, 3)), "min_tokens": 6},
    "stop": {"stop": ["e", "t"], "include_stop_str_in_output": True},
    "ignore_eos": {"ignore_eos": True},
    "top_k and top_p": {"top_k": 20, "top_p": 0.9},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "logprob_token_ids": {"logprob_token_ids": [3, 5], "logprobs": 2},
    "n": {"n": 2},
    "beam search": {"use_beam_search": True, "n": 2, "ignore_eos": True},
    "repetition_detection": {
        "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3}
    },
    "thinking_token_budget": {"thinking_token_budget": 4},
    "structured_outputs": {
        "structured_outputs": {"regex": "[a-p]{4}[0-9]{4}"}, "logit_bias": {str(END): 8.0},
    },
    "response_format": {
        "response_format": {"type": "json_object"}, "thinking_token_budget": 3, "logit_bias": {},
    },
}  # fmt: skip


def flags(runner):
    """Of `vllm serve`, beside those of every server here."""
    return (
        "--logits-processors", f"engine_cases.leaning:LeanOn{runner.upper()}",
        "--reasoning-parser", "in-brackets",
        "--reasoning-parser-plugin", str(Path(__file__).with_name("in_brackets.py")),
        "--reasoning-config", json.dumps(MARKS),
    )  # fmt: skip


# What vLLM refuses beside other drafts, or what has fewer nodes.
SPECIAL = ("logit_bias", "min_p", "custom processor", "thinking_token_budget", "structured_outputs")


def bodies(runner, names=PARAMETERS):
    """(name, request) of parameters, greedy and seeded; on V2, which is slow here, in turn."""
    rng = random.Random(9)
    for number, name in enumerate(names):
        fields = PARAMETERS[name]
        wanted = (0, 1.0) if runner == "v1" else (number % 2,)
        if name == "n":
            wanted = (1.0,)  # vLLM takes one greedy answer only
        for temperature in wanted:
            yield name, {
                "model": "target", "max_tokens": 24 if runner == "v1" else 8, "seed": number,
                "temperature": temperature, "return_token_ids": True,
                "prompt": [rng.randrange(256) for _ in range(rng.randint(2, 30))] + [START],
                **({"temperature": 0} if "use_beam_search" in fields else {}), **fields,
            }  # fmt: skip


def said(server, body):
    """What matters of every choice, or the error."""
    fields = ("token_ids", "text", "finish_reason")
    try:
        choices = server.post("/v1/completions", body)["choices"]
    except RuntimeError as error:
        return str(error)
    return [{field: choice[field] for field in fields} for choice in choices]
