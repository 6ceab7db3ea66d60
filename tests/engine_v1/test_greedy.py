# SPDX-License-Identifier: Apache-2.0
"""Greedy output is plain vLLM's, token for token; no tie occurs (README, What is exact)."""

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from engine_v1.engines import answers, engine, tokens
from engine_v1.oracle import Oracle
from engine_v1.tiny_target import EOS, prompts

GREEDY = SamplingParams(temperature=0, max_tokens=60)


def test_the_tiny_target_says_varied_things(pair):
    said = tokens(pair.plain.generate(prompts(24), GREEDY))
    distinct = sorted(len(set(row)) for row in said)
    assert distinct[len(distinct) // 2] >= 20
    assert sum(count < 8 for count in distinct) <= 2
    assert len({tuple(row[:8]) for row in said}) == len(said)


def test_24_prompts_at_batch_8(pair):
    run = pair.run(prompts(24), GREEDY)
    run.assert_equal()
    run.assert_saw_trees(moves=200, accepted=1.5)
    # Paths of many lengths were accepted.
    assert len(pair.trees.stats["accepted_by_depth"]) >= 10


def test_batch_1(pair):
    for number, prompt in enumerate(prompts(4, seed=11)):
        run = pair.run([prompt], GREEDY, seed=number)
        run.assert_equal()
        run.assert_saw_trees(moves=5)


@pytest.mark.parametrize("seed", range(3))
def test_other_trees_same_answer(pair, seed):
    run = pair.run(prompts(8, seed=5), GREEDY, seed=100 + seed, chains=0, empty=0)
    run.assert_equal()
    run.assert_saw_trees()


@pytest.mark.parametrize(("nodes", "width"), [(60, 10), (100, 20)])
def test_large_trees(make_pair, nodes, width):
    """100 nodes need two words per mask row."""
    pair = make_pair(
        spec_num_speculative_tokens=nodes, spec_beam_width=width, spec_draft_length=6,
        max_num_batched_tokens=2048,
    )  # fmt: skip
    assert pair.trees.most_nodes == nodes
    run = pair.run(prompts(8, seed=6), GREEDY)
    run.assert_equal()
    run.assert_saw_trees(moves=100, accepted=3)


def test_one_node(make_pair):
    pair = make_pair(spec_num_speculative_tokens=1, spec_beam_width=1, spec_draft_length=1)
    run = pair.run(prompts(8), GREEDY, chains=0.5)
    run.assert_equal()
    assert pair.trees.stats["acceptance_length"] > 1.2


@pytest.mark.parametrize("rule", ["best", "beams"])
def test_the_recurrent_drafter(pair, target, taught_drafter, rule):
    """No oracle: the drafter, the beams, the tree rule and the scheduler's lists are the real."""
    trees = engine(
        target, taught_drafter, spec_tree=rule, spec_beam_width=6, spec_draft_length=4,
        spec_num_speculative_tokens=15, spec_prompt_lookup=False,
    )  # fmt: skip
    pair.plain.reset()
    trees.reset()
    # Half of the prompts it has seen, half not: good drafts and bad ones.
    batch = prompts(16) + prompts(16, seed=8)
    expected = pair.plain.generate(batch, GREEDY)
    assert answers(trees.generate(batch, GREEDY)) == answers(expected)
    stats = trees.stats
    assert stats["acceptance_length"] > 1.5, stats
    assert stats["moves"] > 20, stats
    assert len(stats["accepted_by_depth"]) == 4, stats
    assert not stats["fallbacks"], stats


def test_the_drafter_gets_the_state_that_predicted_the_known_token(pair, target):
    """The row handed on is the last accepted node's: its argmax is the token that was emitted."""
    head = load_file(target / "model.safetensors")["lm_head.weight"]
    pair.plain.reset()
    oracle = Oracle(pair.plain.generate(prompts(8), GREEDY), 15, range(EOS))
    oracle.contexts = []
    pair.trees.reset(oracle)
    pair.trees.generate(prompts(8), GREEDY)
    known = torch.tensor([token for token, _ in oracle.contexts])
    states = torch.stack([state for _, state in oracle.contexts])
    assert len(known) > 50
    assert pair.trees.stats["moves"] > 20
    assert torch.equal((states @ head.T).argmax(-1), known)


def test_an_engine_without_redrafter_is_untouched(pair, target):
    """Plain engines in the same process keep vLLM's own runner and attention."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    assert type(pair.plain.runner) is CPUModelRunner
    for layer in pair.plain.runner.compilation_config.static_forward_context.values():
        assert type(layer.impl) is CPUAttentionBackendImpl
    assert engine(target) is pair.plain
