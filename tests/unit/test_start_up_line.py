# SPDX-License-Identifier: Apache-2.0
"""The line that says at start-up what runs."""

import torch

from vllm_redrafter.engine import start_up_line
from vllm_redrafter.engine.start_up_line import what_runs
from vllm_redrafter.engine.target_shape import Shape, TargetShape
from vllm_redrafter.options import ReDrafterOptions

CPU = torch.device("cpu")
TREES = TargetShape(Shape.TREE)


def test_everything_is_in_it(monkeypatch):
    monkeypatch.setattr(start_up_line, "has_kernel", lambda device: True)
    monkeypatch.setattr(start_up_line, "isa", lambda: "avx512_bf16")
    options = ReDrafterOptions(model="D", num_speculative_tokens=24)
    assert what_runs(options, "T", "V1", CPU, TREES) == (
        "ReDrafter is on: drafter 'D' for target 'T', which gets trees, W=4, L=3, N=24, rule best, "
        "lookup 16 tokens, budget auto, operators avx512_bf16, Model Runner V1."
    )


def test_apples_tree_without_compiled_operators(monkeypatch):
    monkeypatch.setattr(start_up_line, "has_kernel", lambda device: False)
    options = ReDrafterOptions(
        model="D", num_speculative_tokens=6, beam_width=2, tree="beams", prompt_lookup=False,
        node_budget="fixed", num_speculative_tokens_per_batch_size=((1, 4, 6), (5, 64, 0)),
    )  # fmt: skip
    assert what_runs(options, "T", "V1", CPU, TREES) == (
        "ReDrafter is on: drafter 'D' for target 'T', which gets trees, W=2, L=3, N=6 (6 for 1 to "
        "4 requests, 0 for 5 to 64 requests), rule beams, lookup off, budget fixed, operators not "
        "compiled (slow; see `vllm-redrafter doctor`), Model Runner V1."
    )


def test_a_target_that_gets_chains_and_why(monkeypatch):
    monkeypatch.setattr(start_up_line, "has_kernel", lambda device: False)
    shape = TargetShape(Shape.CHAIN, "its layers are a recurrence", keeps_states=True)
    line = what_runs(ReDrafterOptions("D", 3), "T", "V1", CPU, shape)
    assert "for target 'T', which gets chains (its layers are a recurrence), W=4" in line


def test_a_gpus_architecture(monkeypatch):
    monkeypatch.setattr(start_up_line, "has_kernel", lambda device: True)
    monkeypatch.setattr(start_up_line, "cuda_architectures", lambda: "8.0;9.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    line = what_runs(ReDrafterOptions("D", 15), "T", "V2", torch.device("cuda"), TREES)
    assert "operators CUDA 9.0 (built for 8.0;9.0), Model Runner V2." in line
