# SPDX-License-Identifier: Apache-2.0
"""Whatever the scheduler does with a request, its output stays plain vLLM's."""

from vllm import SamplingParams

from engine_v1.engines import tokens
from engine_v1.tiny_target import prompts

GREEDY = SamplingParams(temperature=0, max_tokens=60)


def test_chunked_prefill_beside_trees_under_a_budget_that_cuts_them(make_pair):
    pair = make_pair(max_num_batched_tokens=40, enable_chunked_prefill=True)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    run = pair.run(prompts(20, shortest=40, longest=120), params)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.cut > 10
    assert pair.trees.mixed_steps > 10


def test_the_smallest_budget_that_is_allowed(make_pair):
    """1 + N tokens a step: every tree takes the whole step, or is cut."""
    pair = make_pair(max_num_batched_tokens=16, enable_chunked_prefill=True)
    run = pair.run(prompts(6), SamplingParams(temperature=0, max_tokens=24))
    run.assert_equal()
    run.assert_saw_trees(moves=1, accepted=0.1)


def test_one_request_at_the_limit_does_not_end_the_others_drafts(make_pair):
    """vLLM's own check blanks the whole batch when one request nears max_model_len."""
    pair = make_pair(max_model_len=128)
    batch = [prompts(1, shortest=120, longest=120)[0], *prompts(3, shortest=5, longest=8)]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    run = pair.run(batch, params, chain_first=True, chains=1.0, empty=0)
    run.assert_equal()
    # Chains of 15 known tokens: 100 tokens take about 7 steps, and 100 if drafts were blanked.
    assert pair.trees.stats["steps"] <= 10


def test_preemption_under_tight_kv_memory(make_pair):
    pair = make_pair(num_gpu_blocks_override=16)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    run = pair.run(prompts(12, shortest=20, longest=60), params)
    run.assert_equal()
    run.assert_saw_trees()
    assert pair.trees.preemptions > 3


def test_prefix_cache_same_prompts_three_rounds(pair):
    batch = prompts(12, shortest=70, longest=130)
    run = pair.run(batch, GREEDY)
    run.assert_equal()
    for round_ in range(2):
        pair.trees.runner._draft_trees.__func__._source.seed(round_)
        again = pair.trees.generate(batch, GREEDY)
        assert tokens(again) == tokens(run.expected)
        # Two whole blocks of 32 at least.
        assert all(output.num_cached_tokens >= 64 for output in again)
    run.assert_saw_trees()


def test_a_second_turn_reads_the_moved_blocks(pair):
    """The next prompt holds generated text, whose KV comes from accepted branches."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    first = prompts(8, shortest=10, longest=30)
    run = pair.run(first, params, chains=0, empty=0)
    run.assert_equal()
    run.assert_saw_trees(moves=100)
    second = [
        prompt + said + more
        for prompt, said, more in zip(first, tokens(run.got), prompts(8, seed=9), strict=True)
    ]
    # Not through `run`: it would forget the cached prefixes.
    expected = pair.plain.generate(second, GREEDY)
    got = pair.trees.generate(second, GREEDY)
    assert tokens(got) == tokens(expected)
    for prompt, output in zip(first, got, strict=True):
        # Whole blocks of the first prompt and its answer, the last token's KV not among them.
        assert output.num_cached_tokens >= (len(prompt) + 99) // 32 * 32


def test_fewer_nodes_in_larger_batches(make_pair):
    schedule = [[1, 2, 12], [3, 4, 3], [5, 8, 0]]
    pair = make_pair(spec_num_speculative_tokens_per_batch_size=schedule)
    params = [
        SamplingParams(temperature=0, max_tokens=10 + 12 * i, ignore_eos=True) for i in range(8)
    ]
    seen = {}
    verify = pair.trees.runner._tree_to_verify

    def note(req_id, scheduled):
        batch = len(pair.trees.runner.input_batch.req_ids)
        seen.setdefault(batch, set()).add(len(scheduled or []))
        return verify(req_id, scheduled)

    pair.trees.runner._tree_to_verify = note
    try:
        run = pair.run(prompts(8), params)
    finally:
        pair.trees.runner._tree_to_verify = verify
    run.assert_equal()
    assert max(seen[8]) == max(seen[6]) == 0
    assert max(seen[3]) == 3
    assert 3 < max(seen[1]) <= 12


def test_nothing_is_remembered_of_finished_requests(pair):
    pair.run(prompts(8), GREEDY)
    pair.trees.generate(prompts(1), SamplingParams(temperature=0, max_tokens=1))
    assert not pair.trees.runner._trees
