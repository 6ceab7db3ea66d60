# SPDX-License-Identifier: Apache-2.0
"""Trees of the real drafter and of the lookup, for texts that repeat themselves.

A request may only say a few letters, which its prompt consists of too: so much of what it says was
there before, often with another continuation.
"""

import random
from types import SimpleNamespace

import pytest
from engine_cases.cases import CHUNKED, IDS, SHORT, TIGHT, text
from engine_cases.run import streams_of
from engine_v1.engines import answers, tokens
from vllm import SamplingParams

from engine_v2.own_process.engines import HYBRID, engine
from vllm_redrafter.engine.v2 import model_state
from vllm_redrafter.engine.v2.accept import kv_moves
from vllm_redrafter.ops.suffix_lookup import suffix_lookup

# Letters that each request may say; no two requests have one in common.
ALPHABETS = [[IDS.index(letter) for letter in word] for word in
             ("abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx", "ABCD", "EFGH")]  # fmt: skip
DRAFT_LENGTH = HYBRID["spec_draft_length"]


def repetitive(count, shortest=12, longest=30, seed=3):
    """Prompts in which passages come again."""
    source = random.Random(seed)
    made = []
    for i in range(count):
        letters = ALPHABETS[i % len(ALPHABETS)]
        passage = source.choices(letters, k=7)
        prompt = []
        while len(prompt) < longest:
            prompt += passage if source.random() < 0.7 else source.choices(letters, k=3)
        made.append(prompt[: source.randint(shortest, longest)])
    return made


def only(number, **kind):
    kind = {"temperature": 0, "max_tokens": 32, **kind}
    letters = ALPHABETS[number % len(ALPHABETS)]
    return SamplingParams(allowed_token_ids=letters, ignore_eos=True, **kind)


def by_plain(pair, prompts, params):
    pair.plain.reset()
    return pair.plain.generate(prompts, params)


def check(trees, prompts, params, expected, **least):
    """The same answers; gives the counters. ``least``: of those named."""
    trees.reset(prefixes=least.pop("prefixes", True))
    assert answers(trees.generate(prompts, params)) == answers(expected)
    stats = trees.stats
    for name, value in least.items():
        assert stats[name] >= value, stats
    return stats


@pytest.fixture(scope="module")
def greedy(pair):
    """What plain vLLM says to four requests."""
    prompts, params = repetitive(4), [only(i) for i in range(4)]
    return prompts, params, by_plain(pair, prompts, params)


@pytest.fixture(scope="module")
def honest(hybrid, greedy):
    """Counters of the run with nothing broken."""
    return check(hybrid, *greedy)


def test_long_continuations_through_other_branches(honest):
    stats = honest
    assert stats["acceptance_length"] > 3.5 and stats["moves"] > 10, stats
    # Far deeper than the drafter reaches.
    assert len(stats["accepted_by_depth"]) > DRAFT_LENGTH + 6, stats
    for counted in ("nodes_by_source", "accepted_by_source"):
        assert set(stats[counted]) == {"drafter", "lookup", "both"}
    assert stats["accepted_by_source"]["lookup"] > 40, stats
    assert stats["nodes_by_source"]["drafter"] > 20, stats
    assert sum(stats["nodes_by_source"].values()) == round(
        stats["nodes_per_draft"] * stats["drafts"]
    )
    accepted = stats["drafts"] * (stats["acceptance_length"] - 1)
    assert sum(stats["accepted_by_source"].values()) == round(accepted)


def test_all_kinds_of_requests(pair, hybrid):
    """Sampling by seed, chains for penalties, several completions."""
    kinds = [
        {"temperature": 1.0, "seed": 1}, {"presence_penalty": 0.3}, {},
        {"temperature": 0.7, "seed": 2, "top_p": 0.9}, {"repetition_penalty": 1.1},
        {"temperature": 0.8, "seed": 3, "n": 2},
    ]  # fmt: skip
    prompts, params = repetitive(6), []
    for number, kind in enumerate(kinds):
        params.append(only(number, **{"max_tokens": 10, **kind}))
    expected = by_plain(pair, prompts, params)
    stats = check(hybrid, prompts, params, expected, acceptance_length=1.5, moves=5)
    assert stats["fallbacks"] == {"penalties (chain)": 2}


def test_stop_strings_inside_a_continuation(pair, hybrid, greedy):
    prompts, _, said = greedy
    ends = [text(stream)[20 + i : 23 + i] for i, stream in enumerate(streams_of(said))]
    params = [only(i, stop=[end]) for i, end in enumerate(ends)]
    expected = by_plain(pair, prompts, params)
    assert all(row[0][1] == "stop" for row in answers(expected))
    check(hybrid, prompts, params, expected, acceptance_length=2)


@pytest.mark.parametrize(
    "settings, lengths, max_tokens",
    [(CHUNKED, (50, 110), 16), (TIGHT, (26, 30), 28), (SHORT, (40, 50), None)],
    ids=["chunked", "preempted", "to the end of the context"],
)
def test_scheduling(make_pair, settings, lengths, max_tokens):
    """A drafter that knows nothing, so the lookup does it."""
    pair = make_pair(**settings)
    prompts, params = repetitive(6, *lengths), [only(i, max_tokens=max_tokens) for i in range(6)]
    expected = by_plain(pair, prompts, params)
    stats = check(pair.trees, prompts, params, expected, acceptance_length=1.8, moves=5)
    assert stats["accepted_by_source"]["lookup"] > 30, stats
    assert settings is not TIGHT or pair.trees.preemptions > 0


def test_prefix_cache(pair, hybrid, greedy):
    """What is cached is not computed again, but it is looked at."""
    prompts, params, said = greedy
    check(hybrid, *greedy)
    longer = [prompt + row for prompt, row in zip(prompts, tokens(said), strict=True)]
    expected = by_plain(pair, longer, params)
    hybrid.reset(prefixes=False)
    got = hybrid.generate(longer, params)
    assert answers(got) == answers(expected)
    assert sum(output.num_cached_tokens >= 32 for output in got) >= 3
    assert hybrid.stats["acceptance_length"] > 3, hybrid.stats


def test_aborted_requests(pair, hybrid):
    """Who comes next in a slot has a text of its own."""
    prompts, params = repetitive(11), [only(i, max_tokens=10) for i in range(11)]
    expected = tokens(by_plain(pair, prompts, params))
    hybrid.reset()
    serving, said, leaving = hybrid.llm.llm_engine, {}, ["0", "3", "7"]
    for number, prompt in enumerate(prompts):
        serving.add_request(str(number), {"prompt_token_ids": prompt}, params[number])
    steps = 0
    while serving.has_unfinished_requests():
        for output in serving.step():
            if output.finished:
                said[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 2:
            serving.abort_request(leaving)
    assert said == {i: row for i, row in enumerate(expected) if str(i) not in leaving}
    assert hybrid.stats["acceptance_length"] > 1.8, hybrid.stats


@pytest.mark.parametrize("what", ["one token ahead", "another request's text"])
def test_a_lookup_that_is_wrong(hybrid, greedy, honest, monkeypatch, what):
    """What is said stays plain vLLM's, whatever is drafted; less is accepted."""
    lookup = hybrid.speculator._lookup

    def wrong(slots):
        slots = slots.int()
        ends = lookup.lengths[slots] + 1
        if what != "one token ahead":
            slots = slots ^ 1
            ends = lookup.lengths[slots]
        return suffix_lookup(lookup.text, slots, ends * 0, ends, depth=lookup.depth)

    lookup.text.zero_()  # of the honest run, in slots that nobody has now
    monkeypatch.setattr(hybrid.speculator, "_lookup", wrong)
    stats = check(hybrid, *greedy)
    assert stats["accepted_by_source"]["lookup"] < honest["accepted_by_source"]["lookup"] / 4
    assert stats["acceptance_length"] < honest["acceptance_length"] - 1


def test_a_walk_that_ends_where_the_drafter_does(hybrid, greedy, honest, monkeypatch):
    """Less is accepted, and that is all."""
    monkeypatch.setattr(hybrid.state.trees, "depth", DRAFT_LENGTH)
    stats = check(hybrid, *greedy)
    assert len(stats["accepted_by_depth"]) == DRAFT_LENGTH
    assert stats["acceptance_length"] < honest["acceptance_length"] - 0.5


def test_moves_that_end_where_the_drafter_does(hybrid, greedy, monkeypatch):
    """KV of deeper nodes stays where it was computed: that is seen."""
    prompts, params, expected = greedy

    def few_moves(path, *rest):
        return kv_moves(path[:, :DRAFT_LENGTH], *rest)

    monkeypatch.setattr(model_state, "kv_moves", few_moves)
    hybrid.reset()
    assert answers(hybrid.generate(prompts, params)) != answers(expected)


@pytest.mark.slow
def test_nodes_by_batch_size(pair, target, taught_drafter):
    """None for many requests: then the drafter does not run."""
    trees = engine(
        target, taught_drafter, **HYBRID,
        spec_num_speculative_tokens_per_batch_size=[[1, 2, 15], [3, 4, 5], [5, 8, 0]],
    )  # fmt: skip
    prompts = repetitive(7)
    params = [only(i, max_tokens=6 + 6 * i) for i in range(7)]
    expected = by_plain(pair, prompts, params)
    stats = check(trees, prompts, params, expected, acceptance_length=2)
    assert stats["steps_without_nodes"] > 4 and stats["nodes_per_draft"] < 15, stats


def test_the_text_is_vllms(hybrid):
    """At the time of a draft it ends with the token that was just said."""
    lookup, seen = hybrid.speculator._lookup, []

    def checked(context, known, batch, nodes):
        drafted = hybrid.drafts_itself(context, known, batch, nodes)
        for slot, token in zip(batch.idx_mapping.tolist(), known.tolist(), strict=True):
            seen.append(int(lookup.text[slot, int(lookup.lengths[slot]) - 1]) == token)
        return drafted

    hybrid.reset(SimpleNamespace(draft=lambda _, *given: checked(*given, 15)))
    hybrid.generate(repetitive(3), [only(i, max_tokens=12) for i in range(3)])
    assert len(seen) > 8 and all(seen)
