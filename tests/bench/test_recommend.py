# SPDX-License-Identifier: Apache-2.0
"""What is recommended, from speed-ups that are made up."""

import pytest

from vllm_redrafter.bench.recommend import Measured, choose, measured, recommend, scores

CONFIGS = {
    "plain": None,
    "redrafter": {"method": "redrafter", "model": "d"},
    "chain": {"method": "redrafter", "model": "d", "beam_width": 1},
    "4,3,7": {"method": "redrafter", "model": "d", "num_speculative_tokens": 7},
}


def report(speed_ups, rates=(), load=0.0, rounds=None):
    """``speed_ups``: by batch size, by variant."""
    results = []
    for size, by_variant in speed_ups.items():
        variants = {"plain": {"all": {"ratio": None}}}
        for name, value in by_variant.items():
            each = [value, value] if rounds is None else rounds
            variants[name] = {"all": {"ratio": {"overall": value, "per_round": each}}}
        results.append({"batch_size": size, "set": "s", "other_load": load, "variants": variants})
    return {"results": results, "rates": list(rates), "sets": {"s": {}},
            "labels": {name: name.upper() for name in CONFIGS}}  # fmt: skip


def test_the_fastest_over_all_loads():
    found = recommend(report({1: {"redrafter": 2.0, "chain": 1.5},
                              8: {"redrafter": 1.0, "chain": 1.5}}), CONFIGS)  # fmt: skip
    assert found["variant"] == "chain" and found["sure"]
    assert found["scores"] == pytest.approx({"plain": 1, "redrafter": 2**0.5, "chain": 1.5})
    assert found["flag"] == (
        "--speculative-config '{\"method\": \"redrafter\", \"model\": \"d\", \"beam_width\": 1}'"
    )
    assert found["why"] == "CHAIN: over all loads 1.50 times plain vLLM (REDRAFTER 1.41)."


def test_of_equals_the_simplest():
    found = recommend(report({1: {"4,3,7": 1.52, "chain": 1.51, "redrafter": 1.5}}), CONFIGS)
    assert found["variant"] == "redrafter"
    assert "4,3,7 is less than 3% faster, which such runs cannot tell apart" in found["why"]
    # Just above the margin it is not equal any more.
    assert choose({"plain": 1.0, "redrafter": 1.5, "chain": 1.5 * 1.031}) == "chain"


def test_nothing_is_recommended_where_nothing_is_faster():
    found = recommend(report({1: {"redrafter": 1.02, "chain": 0.7}}), CONFIGS)
    assert (found["variant"], found["flag"]) == ("plain", "")
    assert found["why"].startswith("Leave speculative decoding out: nothing that was measured is")


def test_losses_are_named():
    found = recommend(report({1: {"redrafter": 2.0}, 64: {"redrafter": 0.9}}), CONFIGS)
    assert found["variant"] == "redrafter"
    assert "slower than plain vLLM at batch size 64 (0.90)" in found["why"]


def test_other_load_and_rounds_that_disagree_make_it_unsure():
    busy = recommend(report({1: {"redrafter": 2.0}}, load=0.8), CONFIGS)
    assert not busy["sure"] and "Other programs used up to 0.8 cores" in busy["why"]
    unsteady = recommend(report({1: {"redrafter": 1.1}}, rounds=[0.9, 1.3]), CONFIGS)
    assert not unsteady["sure"] and "rounds differ by more than its gain" in unsteady["why"]
    assert recommend(report({1: {"redrafter": 1.1}}, rounds=[1.05, 1.3]), CONFIGS)["sure"]


def test_rates_count_by_latency_where_every_variant_had_a_server():
    row = {"rate": 2.0, "other_load": 0.0, "servers": {
        "plain": {},
        "redrafter": {"ratios": {"tpot_p50_ms": {"median": 1.25, "low": 1.0, "high": 2.0}}},
    }}  # fmt: skip
    alone = report({1: {"redrafter": 2.0}}, [row])
    found = recommend(alone, CONFIGS)
    assert found["scores"]["redrafter"] == pytest.approx((2.0 * 0.8) ** 0.5)
    assert "2 requests/s (0.80)" in found["why"]
    assert measured(alone)[1].rounds == (0.8, 0.5, 1.0)
    # A chain without a server: rates cannot decide between the two.
    both = report({1: {"redrafter": 2.0, "chain": 1.9}}, [row])
    assert scores(measured(both)) == {"plain": 1.0, "redrafter": pytest.approx(2.0),
                                      "chain": pytest.approx(1.9)}  # fmt: skip


def test_no_load_in_common():
    found = scores([Measured("a", "x", 2.0), Measured("b", "y", 3.0), Measured("b", "z", 1.5)])
    assert found == {"plain": 1.0, "b": pytest.approx(4.5**0.5)}


def test_nothing_measured():
    found = recommend(report({}), CONFIGS)
    assert found["variant"] is None and not found["sure"] and "--minutes" in found["why"]
