# SPDX-License-Identifier: Apache-2.0
"""The compiled suffix lookup gives its twin's tokens and scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lookup_cases import POISON, Batch, assert_same, one_text, outputs, random_batch

from vllm_redrafter.drafter.beam_search import FILLER_SCORE
from vllm_redrafter.lookup.suffix import suffix_lookup as twin
from vllm_redrafter.ops import suffix_lookup as module
from vllm_redrafter.ops.suffix_lookup import suffix_lookup


# ``each_isa`` holds for all examples of a test.
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(0, 5),
    rows=st.integers(1, 4),
    # Around the sizes of the blocks that are compared at once, 16, 32 and 64 tokens.
    columns=st.sampled_from([0, 1, 2, 9, 17, 33, 65, 66, 130, 300]),
    vocab=st.sampled_from([1, 2, 3, 12, 60]),
    chains=st.integers(1, 9),
    depth=st.integers(1, 20),
    window=st.sampled_from([1, 2, 8, 32, 1000]),
    longest=st.sampled_from([1, 2, 8, 32, 1000]),
    seed=st.integers(0, 10**6),
)
def test_identical_to_the_twin(
    each_isa, batch, rows, columns, vocab, chains, depth, window, longest, seed
):
    case = random_batch(batch, rows, columns, vocab, seed=seed)
    sizes = {"chains": chains, "depth": depth, "window": window, "longest": longest}
    assert_same(suffix_lookup(*case, **sizes), twin(*case, **sizes))


@pytest.mark.parametrize("length", [*range(60, 70), *range(124, 132), 1000])
def test_every_place_is_found(each_isa, length):
    """One earlier occurrence, wherever it is; nothing where there is none."""
    assert not suffix_lookup(*one_text([*range(1, length), 0])).matched.any()
    for at in range(0, length - 1, 1 if length < 200 else 37):
        text = list(range(1, length + 1))
        text[at] = text[-1]
        found = suffix_lookup(*one_text(text), depth=length)
        assert found.matched.tolist() == [[1, 0, 0, 0]]
        period = length - 1 - at
        assert found.tokens[0, 0].tolist() == [text[at + 1 + i % period] for i in range(length)]


def meaning(text: list[int], chains: int, depth: int, window: int, longest: int) -> list[tuple]:
    """(matched, continuation) by comparing whole slices: another statement than the twin's."""
    ends = [i for i in range(1, len(text)) if text[i - 1 : i] == text[-1:]][-window:]
    found = []
    for end in ends:
        matched = max(
            m for m in range(1, min(longest, end) + 1) if text[end - m : end] == text[-m:]
        )
        loop = text[end:]
        found.append((matched, end, (loop * depth)[:depth]))
    found.sort(key=lambda match: match[:2], reverse=True)
    return [(matched, tokens) for matched, _, tokens in found[:chains]]


@pytest.mark.parametrize("lookup", [twin, suffix_lookup], ids=["twin", "compiled"])
@pytest.mark.parametrize("seed", range(12))
def test_meaning(lookup, seed):
    torch.manual_seed(seed)
    text = torch.randint((2, 3, 8)[seed % 3], (int(torch.randint(1, 90, ())),)).tolist()
    for sizes in ((4, 16, 32, 32), (3, 5, 6, 4), (1, 1, 1, 1), (70, 9, 100, 100)):
        wanted = meaning(text, *sizes)
        names = dict(zip(("chains", "depth", "window", "longest"), sizes, strict=True))
        found = lookup(*one_text(text), **names)
        pairs = zip(found.matched[0].tolist(), found.tokens[0].tolist(), strict=True)
        assert [pair for pair in pairs if pair[0]] == wanted
        assert not found.tokens[0, len(wanted) :].any()
        assert (found.scores[0, len(wanted) :] == FILLER_SCORE).all()
        assert (found.scores[0, : len(wanted)] > FILLER_SCORE).all()
        assert (found.scores[0].diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("lookup", [twin, suffix_lookup], ids=["twin", "compiled"])
def test_tokens_outside_the_text_do_not_matter(lookup):
    """Behind the end stands what the lookup would like to see, before the start too."""
    text = [5, 1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2]
    wanted = lookup(*one_text(text))
    assert wanted.matched[0].tolist() == [2, 2, 0, 0]
    for behind in ((3, 8, 7, 1, 2, 3), (2, 1, 2, 1, 2), (0,) * 70):
        assert_same(lookup(*one_text(text, behind=behind)), wanted)
    case = one_text([1, 2, 3, 9, 1, 2, 7, 1, 2, *text], behind=(3, 8))
    assert_same(lookup(*case._replace(starts=torch.tensor([9], dtype=torch.int32))), wanted)
    # One token further, and the results are others.
    further = one_text([*text, 3])
    assert lookup(*further).tokens[0, 0].tolist() != wanted.tokens[0, 0].tolist()


def test_poisoned_outputs_are_fully_written_and_rows_strided():
    case = random_batch(5, 3, 60, 4, seed=1)
    wide = torch.cat([case.text + 1, case.text, case.text + 2], 1)
    strided = torch.cat([wide, wide])[::2][:3]
    strided.copy_(wide)
    strided = strided[:, 60:120]
    assert strided.stride() == (360, 1)
    found, wanted = outputs(5, 4, 16), twin(*case)
    torch.ops.redrafter.suffix_lookup(
        found.tokens, found.matched, found.scores, strided, *case[1:], 32, 32
    )
    assert_same(found, wanted)
    empty = outputs(2, 4, 16)
    nothing = torch.zeros(2, dtype=torch.int32)
    torch.ops.redrafter.suffix_lookup(
        empty.tokens, empty.matched, empty.scores, strided, nothing, nothing, nothing, 32, 32
    )
    assert all((t != POISON).all() for t in (empty.tokens, empty.matched, empty.scores))


def test_defaults_are_the_twins():
    case = random_batch(3, 3, 200, 5, seed=2)
    assert_same(suffix_lookup(*case), twin(*case))


def replaced(case: Batch, **values: list[int]) -> Batch:
    return case._replace(**{k: torch.tensor(v, dtype=torch.int32) for k, v in values.items()})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": [0, 3]}, "slots holds 3; with 3 rows of text it must be 0 to 2"),
        ({"slots": [-1, 0]}, "slots holds -1; with 3 rows"),
        ({"starts": [0, -2], "ends": [4, 4]}, "A text from -2 to 4 is none in rows of 20 tokens"),
        ({"starts": [5, 0], "ends": [4, 4]}, "A text from 5 to 4 is none"),
        ({"starts": [0, 0], "ends": [20, 21]}, "A text from 0 to 21 is none"),
    ],
)
def test_requests_that_cannot_be(values, message):
    case = random_batch(2, 3, 20, 4, seed=3)
    with pytest.raises(RuntimeError, match=message):
        suffix_lookup(*replaced(case, **values))


def test_bad_arguments():
    case = random_batch(2, 3, 20, 4, seed=4)
    for name in ("chains", "depth", "window", "longest"):
        for lookup in (suffix_lookup, twin):
            with pytest.raises(ValueError, match=f"{name} 0.*must all be at least 1"):
                lookup(*case, **{name: 0})
    with pytest.raises(RuntimeError, match="text has dtype Long; it must be Int"):
        suffix_lookup(case.text.long(), *case[1:])
    with pytest.raises(RuntimeError, match="ends has dtype Long; it must be Int"):
        suffix_lookup(*case[:3], case.ends.long())
    with pytest.raises(RuntimeError, match="starts has 1 elements; it must have 2"):
        suffix_lookup(*case[:2], case.starts[:1], case.ends)
    with pytest.raises(RuntimeError, match="text has 1 dimensions; it must have 2"):
        suffix_lookup(case.text[0], *case[1:])
    with pytest.raises(RuntimeError, match="text must have contiguous rows.*is 3"):
        suffix_lookup(case.text.T.contiguous().T, *case[1:])
    out = outputs(2, 4, 16)
    with pytest.raises(RuntimeError, match="matched must be contiguous and have 8 elements"):
        torch.ops.redrafter.suffix_lookup(out.tokens, out.matched[:1], out.scores, *case, 32, 32)


def test_without_the_library_the_twin_answers(monkeypatch):
    case = random_batch(3, 2, 50, 3, seed=5)
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    monkeypatch.setattr(torch.ops.redrafter.suffix_lookup, "default", None)  # a call would fail
    assert_same(suffix_lookup(*case, depth=5), twin(*case, depth=5))


def test_opcheck():
    case, out = random_batch(3, 2, 50, 3, seed=6), outputs(3, 4, 6)
    torch.library.opcheck(
        torch.ops.redrafter.suffix_lookup.default,
        (out.tokens, out.matched, out.scores, *case, 32, 32),
    )
