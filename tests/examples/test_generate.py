# SPDX-License-Identifier: Apache-2.0
"""examples/generate.py: the executable specification says what greedy ``generate`` says."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from vllm_redrafter import Tree, load_drafter

NEW_TOKENS = 40


@pytest.fixture(scope="module")
def models(target, drafter):
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id
    embedding = model.model.embed_tokens.weight.detach()
    return model, load_drafter(drafter, embedding=embedding, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in (1, 5, 17, 41)]


@pytest.fixture(scope="module")
def greedy(models, prompts):
    model, _ = models
    return [
        model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip


def answers(module, models, prompts, **settings):
    return [module.generate(*models, prompt, NEW_TOKENS, **settings) for prompt in prompts]


@pytest.mark.parametrize("width, length, nodes", [(4, 3, 11), (1, 2, 2), (8, 4, 23)])
def test_the_answer_is_greedy(example, models, prompts, greedy, width, length, nodes):
    found = answers(example("generate"), models, prompts, beam_width=width, draft_length=length,
                    num_nodes=nodes)  # fmt: skip
    assert [tokens for tokens, _ in found] == greedy
    assert sum(acceptance for _, acceptance in found) / len(found) > 1.3


def test_an_answer_ends_with_its_end_token(example, models, prompts, greedy):
    model, _ = models
    usual, wanted = model.generation_config.eos_token_id, greedy[0][15]
    try:
        model.generation_config.eos_token_id = wanted
        [(tokens, _)] = answers(example("generate"), models, prompts[:1])
    finally:
        model.generation_config.eos_token_id = usual
    assert tokens == greedy[0][: greedy[0].index(wanted) + 1]


def in_order_of_the_rows(cache, context, path):
    """The fault: as many rows as were accepted are kept, but the first ones."""
    for layer in cache.layers:
        end = context + 1 + len(path)
        layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]


def without_tree_mask(module):
    """The fault: every node sees all rows before its own, siblings among them."""
    plain = module.forward

    class Causal(Tree):
        def ancestor_mask(self):
            return torch.ones(1, self.max_nodes, self.max_nodes, dtype=torch.bool).tril()

    return lambda target, cache, tree: plain(target, cache, Causal(**vars(tree)))


def with_positions_by_row(module):
    """The fault: rows are numbered one by one, as in a chain."""
    plain = module.forward
    return lambda target, cache, tree: plain(
        target, cache, replace(tree, depths=torch.arange(tree.max_nodes)[None])
    )


@pytest.mark.parametrize("fault", ["KV not moved", "no tree mask", "positions by row"])
def test_each_part_is_needed(example, models, prompts, greedy, fault):
    module = example("generate")
    if fault == "KV not moved":
        module.keep_accepted = in_order_of_the_rows
    elif fault == "no tree mask":
        module.forward = without_tree_mask(module)
    else:
        module.forward = with_positions_by_row(module)
    found = answers(module, models, prompts)
    assert [tokens for tokens, _ in found] != greedy


def test_the_page_stays_a_page(example):
    from pathlib import Path

    lines = Path(example("generate").__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
