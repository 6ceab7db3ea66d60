# SPDX-License-Identifier: Apache-2.0
"""The keys of the JSON object, where their values come from, and every message."""

import dataclasses
import re

import pytest

from vllm_redrafter import options as module
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.options import (
    OptionError,
    ReDrafterOptions,
    check_keys,
    for_chains,
    resolve_options,
)


def drafter(**defaults):
    return DrafterConfig(
        vocab_size=100,
        hidden_size=8,
        exit_dim=8,
        num_draft_layers=1,
        rnn=True,
        draft_vocab_size=100,
        defaults=defaults,
    )


def resolve(user=None, **defaults):
    return resolve_options({"model": "dir", **(user or {})}, drafter(**defaults))


def test_defaults_of_ours():
    options = resolve()
    assert options == ReDrafterOptions(
        model="dir",
        num_speculative_tokens=module.DEFAULT_MAX_BUDGET,
        beam_width=module.DEFAULT_BEAM_WIDTH,
        draft_length=module.DEFAULT_DRAFT_LENGTH,
        tree="best",
        top_k=0,
        prompt_lookup=True,
        prompt_lookup_num_tokens=16,
        node_budget="auto",
        cost_table="",
    )
    assert options.max_depth == 16


def test_the_drafters_defaults_come_before_ours_and_the_users_before_both():
    defaults = {
        "beam_width": 5, "draft_length": 6, "tree": "beams", "top_k": 50,
        "num_speculative_tokens": 20,
    }  # fmt: skip
    assert resolve(**defaults) == ReDrafterOptions(
        "dir", 20, 5, 6, "beams", 50, prompt_lookup=False, node_budget="fixed"
    )
    user = {
        "beam_width": 2, "draft_length": 3, "tree": "best", "top_k": 0,
        "num_speculative_tokens": 4,
    }  # fmt: skip
    assert resolve(user, **defaults) == ReDrafterOptions("dir", 4, 2, 3, "best", 0)


def test_null_means_left_out():
    assert resolve({"beam_width": None}, beam_width=7).beam_width == 7


def test_no_more_nodes_than_a_draft_has():
    user = {"beam_width": 2, "draft_length": 3, "prompt_lookup": False}
    assert resolve(user | {"num_speculative_tokens": 50}).num_speculative_tokens == 6
    assert resolve(user).num_speculative_tokens == 6
    wide = {"beam_width": 10, "draft_length": 10, "node_budget": "fixed"}
    assert resolve(wide).num_speculative_tokens == module.DEFAULT_MAX_NODES
    # Four continuations of the request's own text beside the beams.
    user |= {"prompt_lookup": True, "prompt_lookup_num_tokens": 5, "num_speculative_tokens": 50}
    assert resolve(user).num_speculative_tokens == 26


def test_the_drafters_number_is_for_a_fixed_budget():
    assert resolve(num_speculative_tokens=7).num_speculative_tokens == module.DEFAULT_MAX_BUDGET
    assert resolve({"node_budget": "fixed"}, num_speculative_tokens=7).num_speculative_tokens == 7
    assert resolve({"num_speculative_tokens": 9}, num_speculative_tokens=7) == resolve(
        {"num_speculative_tokens": 9}
    )
    rows = resolve_options({"model": "dir"}, drafter(num_speculative_tokens=7), fixed_rows=True)
    assert rows.num_speculative_tokens == 7


def test_apples_rule_stays_pure():
    options = resolve({"tree": "beams"})
    assert not options.prompt_lookup and options.node_budget == "fixed"
    assert options.max_depth == options.draft_length
    with pytest.raises(OptionError, match="^prompt_lookup is true, but tree 'beams' holds the"):
        resolve({"tree": "beams", "prompt_lookup": True})
    with pytest.raises(OptionError, match="^node_budget is 'auto', but tree 'beams' does not"):
        resolve({"tree": "beams", "node_budget": "auto"})


@pytest.mark.parametrize(
    "key, bad, said",
    [
        ("prompt_lookup", 1, "prompt_lookup is 1 in speculative_config; it must be true or false."),
        ("prompt_lookup_num_tokens", 0, "it must be an integer >= 1."),
        ("node_budget", "some", "it must be one of auto, fixed."),
        ("cost_table", 3, "it must be the path of a file"),
    ],
)
def test_a_bad_value_of_lookup_or_budget(key, bad, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        resolve({key: bad})


@pytest.mark.parametrize("source", ["speculative_config", "the drafter's config.json"])
@pytest.mark.parametrize(
    ("key", "bad", "minimum"),
    [
        ("beam_width", 0, 1),
        ("beam_width", -3, 1),
        ("beam_width", 2.0, 1),
        ("beam_width", "4", 1),
        ("beam_width", True, 1),
        ("draft_length", 0, 1),
        ("draft_length", [3], 1),
        ("top_k", -1, 0),
        ("top_k", 0.5, 0),
        ("num_speculative_tokens", 0, 1),
        ("num_speculative_tokens", -1, 1),
        ("num_speculative_tokens", False, 1),
    ],
)
def test_a_bad_number(key, bad, minimum, source):
    message = f"{key} is {bad!r} in {source}; it must be an integer >= {minimum}."
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        resolve({key: bad}) if source == "speculative_config" else resolve(**{key: bad})


@pytest.mark.parametrize("bad", ["wide", "", 3, ["best"]])
def test_a_bad_tree(bad):
    message = f"tree is {bad!r} in speculative_config; it must be one of best, beams."
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        resolve({"tree": bad})
    message = message.replace("speculative_config", "the drafter's config.json")
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        resolve(tree=bad)


def test_an_unknown_key_lists_the_valid_ones():
    check_keys({"method": "redrafter", "model": "dir", "top_k": 3})
    message = (
        "speculative_config has the unknown key 'beam_widht'; ReDrafter's keys are method, model, "
        "num_speculative_tokens, beam_width, draft_length, tree, top_k, "
        "num_speculative_tokens_per_batch_size, prompt_lookup, prompt_lookup_num_tokens, "
        "node_budget, cost_table, fail_on_target_mismatch, revision."
    )
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        check_keys({"model": "dir", "beam_widht": 4})


def test_options_survive_the_trip_through_vllms_config():
    options = resolve()
    assert ReDrafterOptions(**options.to_dict()) == options
    assert set(options.to_dict()) == {field.name for field in dataclasses.fields(options)}
    assert isinstance(OptionError("x"), ValueError)


SCHEDULE = "num_speculative_tokens_per_batch_size"


def test_nodes_by_batch_size():
    user = {"beam_width": 5, "draft_length": 4, "num_speculative_tokens": 10}
    fixed = resolve(user)
    assert [fixed.nodes_for(batch) for batch in (1, 8, 500)] == [10, 10, 10]
    # In any order; no more than the most; behind the last range its value stays.
    eased = resolve(user | {SCHEDULE: [[3, 8, 4], [1, 2, 99], [9, 32, 0]]})
    assert [eased.nodes_for(batch) for batch in (1, 2, 3, 8, 9, 32, 33, 500)] == [
        10, 10, 4, 4, 0, 0, 0, 0,
    ]  # fmt: skip


def test_a_fixed_number_of_the_user_overrules_the_drafters_schedule():
    schedule = [[1, 4, 8], [5, 64, 2]]
    assert resolve(**{SCHEDULE: schedule}).nodes_for(5) == 2
    assert resolve({"num_speculative_tokens": 6}, **{SCHEDULE: schedule}).nodes_for(5) == 6
    assert resolve({SCHEDULE: [[1, 9, 3]]}, **{SCHEDULE: schedule}).nodes_for(5) == 3


@pytest.mark.parametrize(
    "bad",
    [
        [], 5, "1-4", [[1, 4]], [[1, 4, 2, 2]], [[2, 4, 3]], [[1, 4, -1]], [[4, 1, 3]],
        [[1, 4, 3], [4, 6, 2]], [[1, 4, 3.0]], [[True, 4, 3]], [7],
    ],
)  # fmt: skip
def test_a_bad_schedule(bad):
    message = (
        f"{SCHEDULE} is {bad!r}; it must be a list of [first, last, nodes] with ranges of batch "
        "sizes that start at 1, rise without overlap, and hold 0 or more nodes."
    )
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        resolve({SCHEDULE: bad})


def test_nodes_of_chains():
    """No more than a path has tokens; where each costs a state, those of the drafter."""
    options = resolve(draft_length=5)
    assert for_chains(options, chosen=False, keeps_states=False).num_speculative_tokens == 16
    assert for_chains(options, chosen=False, keeps_states=True).num_speculative_tokens == 5
    more = resolve({"num_speculative_tokens": 8}, draft_length=5)
    assert for_chains(more, chosen=True, keeps_states=True).num_speculative_tokens == 8
    without = resolve({"prompt_lookup": False}, draft_length=5)
    assert for_chains(without, chosen=False, keeps_states=False).num_speculative_tokens == 5
