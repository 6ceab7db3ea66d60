# SPDX-License-Identifier: Apache-2.0
"""Options that cannot be used: the value, the valid ones, and where the value came from."""

import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from vllm_redrafter.options import VALID_KEYS, OptionError


@pytest.fixture
def message(engine_config):
    def refused(**kwargs):
        with pytest.raises(OptionError) as raised:
            engine_config(**kwargs)
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".")
        return text

    return refused


def test_good_options_are_accepted(engine_config):
    options = {"beam_width": 3, "draft_length": 2, "tree": "beams", "top_k": 7}
    config = engine_config(options={**options, "num_speculative_tokens": 5})
    carried = config.additional_config["redrafter"]
    assert {name: carried[name] for name in options} == options
    assert config.speculative_config.num_speculative_tokens == 5


@pytest.mark.parametrize("key", ["foo", "draft_tensor_parallel_size", "beams"])
def test_unknown_key_lists_the_valid_ones(message, key):
    text = message(options={key: 1})
    assert f"the unknown key '{key}'" in text
    for valid in VALID_KEYS:
        assert valid in text


def test_no_model(message):
    assert "needs 'model', the drafter's directory" in message(drafter_dir="")


@pytest.mark.parametrize("name", ["beam_width", "draft_length", "num_speculative_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, [4]])
def test_counts_must_be_positive_integers(message, name, value):
    text = message(options={name: value})
    assert f"{name} is {value!r} in speculative_config; it must be an integer >= 1" in text


@pytest.mark.parametrize("value", [-1, 2.0, "4", False])
def test_top_k(message, value):
    text = message(options={"top_k": value})
    assert f"top_k is {value!r} in speculative_config; it must be an integer >= 0" in text


@pytest.mark.parametrize("value", ["foo", "", 3, ["best"], {}])
def test_tree(message, value):
    text = message(options={"tree": value})
    assert f"tree is {value!r} in speculative_config; it must be one of best, beams" in text


@pytest.mark.parametrize("name, value", [("beam_width", "4"), ("tree", "foo"), ("top_k", -1)])
def test_a_bad_default_of_the_drafter_is_blamed_on_its_config(message, own_drafter, name, value):
    path = own_drafter / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    text = message(drafter_dir=own_drafter)
    assert f"{name} is {value!r} in the drafter's config.json" in text


def test_more_beams_than_tokens_to_choose_from(message, own_drafter):
    few = tiny_models.write_random_drafter(own_drafter, draft_vocab_size=8, shared_head=True)
    save_file(
        load_file(few / "model.safetensors") | {"draft_vocab": torch.arange(8)},
        few / "model.safetensors",
    )
    text = message(options={"beam_width": 9}, drafter_dir=few)
    assert "beam_width is 9, but the drafter chooses among 8 tokens only" in text


BOUNDS = [
    ("beam_width", 64),
    ("draft_length", 64),
    ("prompt_lookup_num_tokens", 256),
    ("top_k", 2**31 - 1),
]


@pytest.mark.parametrize("name, most", BOUNDS)
def test_counts_have_an_upper_bound(message, name, most):
    """Beyond it a draft takes seconds, or the operators cannot hold the number."""
    for value in (most + 1, 2**63, 10**30):
        text = message(options={name: value})
        assert text == f"{name} is {value} in speculative_config; it must be {most} or less."


@pytest.mark.parametrize("name, most", [("beam_width", 64), ("top_k", 2**31 - 1)])
def test_so_has_the_drafters_config(message, own_drafter, name, most):
    path = own_drafter / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 2**63}))
    text = message(drafter_dir=own_drafter)
    assert text == f"{name} is {2**63} in the drafter's config.json; it must be {most} or less."


def test_the_bounds_themselves_are_accepted(engine_config):
    options = dict(BOUNDS) | {"num_speculative_tokens": 9}
    carried = engine_config(options=options).additional_config["redrafter"]
    assert {name: carried[name] for name in options} == options


@pytest.mark.parametrize("adaptive", [False, True])
def test_long_prefills_are_not_cut_below_a_requests_rows(message, adaptive):
    """vLLM's scheduler failed at the first request whose prompt was cached but for one token."""
    text = message(
        options={"num_speculative_tokens": 12},
        long_prefill_token_threshold=12, long_prefill_token_threshold_adaptive=adaptive,
    )  # fmt: skip
    assert text == (
        "num_speculative_tokens 12 needs long_prefill_token_threshold of at least 13, or 0, but "
        "it is 12; raise it or set a smaller num_speculative_tokens."
    )


@pytest.mark.parametrize("threshold", [0, 13])
def test_long_prefills_may_be_cut_above(engine_config, threshold):
    options = {"num_speculative_tokens": 12}
    assert engine_config(options=options, long_prefill_token_threshold=threshold)


@pytest.mark.parametrize("value", [1, "yes", "true"])
def test_flags_are_flags(message, value):
    text = message(options={"fail_on_target_mismatch": value})
    assert f"fail_on_target_mismatch is {value!r} in speculative_config; it must be true" in text


def test_more_nodes_than_the_token_budget_allows(message):
    text = message(
        options={"num_speculative_tokens": 12},
        max_model_len=64, max_num_seqs=4, max_num_batched_tokens=12,
    )  # fmt: skip
    assert "num_speculative_tokens 12 needs max_num_batched_tokens of at least 13" in text
    assert "max_num_batched_tokens is 12; raise it or set a smaller num_speculative_tokens" in text


def test_the_smallest_token_budget_is_accepted(engine_config):
    assert engine_config(
        options={"num_speculative_tokens": 12},
        max_model_len=64, max_num_seqs=4, max_num_batched_tokens=13,
    )  # fmt: skip


def test_more_nodes_than_the_scheduled_tokens_allow(message):
    text = message(
        options={"num_speculative_tokens": 12},
        max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, max_num_scheduled_tokens=12,
    )  # fmt: skip
    assert "needs max_num_scheduled_tokens of at least 13" in text


def test_more_nodes_than_the_longest_sequence(message):
    text = message(options={"num_speculative_tokens": 12}, max_model_len=13)
    assert "num_speculative_tokens 12 needs max_model_len of at least 14" in text
    assert "max_model_len is 13" in text


def test_a_draft_longer_than_the_longest_sequence(message):
    text = message(options={"draft_length": 64}, max_model_len=64)
    assert "draft_length is 64, but max_model_len is 64" in text


def test_more_nodes_than_a_draft_can_fill_are_reduced(engine_config, caplog):
    import logging

    logging.getLogger("vllm").propagate = True
    with caplog.at_level("WARNING", logger="vllm"):
        config = engine_config(
            options={
                "beam_width": 2, "draft_length": 3, "num_speculative_tokens": 60,
                "prompt_lookup": False,
            }  # fmt: skip
        )
    assert config.speculative_config.num_speculative_tokens == 6
    assert "num_speculative_tokens is 60, but beam_width 2 x draft_length 3" in caplog.text


def test_an_option_given_twice(drafter, target, engine_config):
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "redrafter", "model": str(drafter), "num_speculative_tokens": 4}
    with pytest.raises(OptionError, match="spec_tokens and speculative_config's"):
        EngineArgs(
            model=str(target), speculative_config=speculative, spec_tokens=5
        ).create_engine_config()
