# SPDX-License-Identifier: Apache-2.0
"""int8 targets (W8A8, activations quantised per token): no row depends on its neighbours.

Rounding is another matter: where attention's sums differ in the last digit, a value may be
quantised to the next of 255 levels, and logits then differ by much more than in float32.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from engine_v1.engines import Pair, engine, tokens
from engine_v1.tiny_target import prompts, write_target

PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=5)
SPEC = {"spec_num_speculative_tokens": 15, "spec_beam_width": 4, "spec_draft_length": 4}

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel",
                        "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True,
                                  "strategy": "token", "dynamic": True},
        }
    },
}  # fmt: skip


def quantise(directory):
    """The tiny target's matrices as int8 with a scale per output, as compressed-tensors stores."""
    tensors = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": QUANTIZATION})
    )
    return directory


@pytest.fixture(scope="module")
def int8(drafter, tmp_path_factory):
    target = quantise(write_target(tmp_path_factory.mktemp("models") / "int8"))

    def pair(requests):
        common = {"max_num_seqs": requests, "logprobs_mode": "raw_logits"}
        return Pair(engine(target, **common), engine(target, drafter, **common, **SPEC))

    return pair


def logits(outputs):
    """Of the tokens said, and of the four others that come next."""
    return [
        sorted((token, entry.logprob) for token, entry in row.items())
        for output in outputs
        for row in output.outputs[0].logprobs
    ]


def test_plain_rows_do_not_depend_on_the_batch(int8):
    """What quantising per token promises; in float32 the tiny target's rows do not either."""
    batch = prompts(8)
    together = int8(8).plain.generate(batch, PARAMS)
    alone = int8(1).plain.generate(batch, PARAMS)
    assert logits(alone) == logits(together)


def test_rows_of_chains_are_plain_vllms_to_the_bit(int8):
    """16 rows of a request in one step: vLLM's own attention, the target's int8 products."""
    run = int8(8).run(prompts(8), PARAMS, chains=1.0, empty=0)
    run.assert_equal()
    assert int8(8).trees.stats["acceptance_length"] > 8
    assert logits(run.got) == logits(run.expected)


def test_trees_differ_by_levels_of_quantisation_only(int8):
    """Most answers are equal; the others part where two tokens are closer than what was measured.
    """
    run = int8(8).run(prompts(24), PARAMS, chains=0, empty=0)
    said, expected = tokens(run.got), tokens(run.expected)
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 20
    for a, b, output in zip(said, expected, run.expected, strict=True):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            row = output.outputs[0].logprobs[at]
            assert row[b[at]].logprob - row[a[at]].logprob < 0.1
    assert int8(8).trees.stats["moves"] > 50
