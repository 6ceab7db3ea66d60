# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter bench` with real engines and servers, tiny models; times mean nothing here."""

from __future__ import annotations

import json

import pytest
import tiny_models

from vllm_redrafter import cli

TOKENS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    target = tiny_models.write_llama(tmp_path_factory.mktemp("bench") / "tiny", context_weight=0.8)
    drafter = tmp_path_factory.mktemp("bench-drafter") / "fitted"
    return target, tiny_models.write_fitted_drafter(drafter, target, steps=150)


@pytest.mark.long
@pytest.mark.slow
def test_engines_and_servers(models, tmp_path, capsys):
    target, drafter = models
    lines = [json.dumps({"prompt": text}) for text in ("hello there", "once upon a time")]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    assert cli.main([
        "bench", str(target), str(drafter), "--prompts", str(tmp_path / "mine.jsonl"), "--raw",
        "--dtype", "float32", "--max-tokens", str(TOKENS), "--batch-sizes", "1", "2",
        # A budget may verify nothing, by times that mean nothing here.
        "--redrafter", '{"node_budget": "fixed", "num_speculative_tokens": 7}',
        "--rounds", "2", "--variants", "redrafter", "--rates", "20", "--rate-seconds", "0.5",
        "--out", str(tmp_path / "out"),
    ]) == 0  # fmt: skip
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [result["batch_size"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        ours, plain = result["variants"]["redrafter"], result["variants"]["plain"]
        assert ours["equality"]["equal"] == ours["equality"]["total"] == 2
        whole = ours["all"]
        assert whole["acceptance_length"] > 1.2 and whole["nodes_per_step"] > 0.5
        assert sum(whole["accepted_by_source"].values()) == pytest.approx(1)
        assert set(whole["part_ms_per_step"]) >= {"draft", "tree", "walk"}
        assert plain["all"]["acceptance_length"] is None
        for one in (ours, plain):
            requests = one["requests"]["all"]
            assert requests["requests"] == 4
            # The shorter ones of the first and of the later times fit into the call's mean.
            quick = requests["first_ms"]["low"] + (TOKENS - 1) * requests["per_token_ms"]["low"]
            seconds = result["batch_size"] * TOKENS / one["all"]["tokens_per_second"]
            assert 0.05 * seconds < quick / 1e3 < 1.01 * seconds
        # Counters of single requests are those of the engine.
        lengths = ours["requests"]["all"]["acceptance_length"], whole["acceptance_length"]
        assert lengths[0] == pytest.approx(lengths[1])
    [row] = report["rates"]
    served = row["servers"]
    assert served["plain"]["tokens"] == served["redrafter"]["tokens"] == 16 * TOKENS
    assert served["redrafter"]["acceptance_length"] > 1.2
    assert served["redrafter"]["accepted_by_source"] and not served["plain"]["accepted_by_source"]
    assert served["redrafter"]["ttft_p50_ms"] > 0 and served["redrafter"]["tpot_p50_ms"] > 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    out = capsys.readouterr().out
    assert report["recommendation"]["why"] in out and "| 2 | ReDrafter |" in out
