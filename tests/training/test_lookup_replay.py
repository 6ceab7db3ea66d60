# SPDX-License-Identifier: Apache-2.0
"""The replay with a lookup is a step-by-step decoding that sees the past alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EOS, write_fitted_drafter

from vllm_redrafter.cli import main
from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.lookup.suffix import suffix_lookup
from vllm_redrafter.training import replay as subject
from vllm_redrafter.training.answers import Recorded
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.options import EvalOptions
from vllm_redrafter.training.replay import Counts, Replay, Setting, replay
from vllm_redrafter.training.target import Target
from vllm_redrafter.tree.candidates import choose_tree, merge_candidates

SETTINGS = [Setting(1, 2, 3), Setting(3, 2, 7), Setting(3, 2, 24)]


@pytest.fixture(scope="module")
def frozen(target) -> Target:
    return Target(target, "float32", torch.device("cpu"))


@pytest.fixture(scope="module")
def fitted(target, tmp_path_factory) -> Path:
    return write_fitted_drafter(tmp_path_factory.mktemp("lookup") / "fitted", target, steps=60)


@pytest.fixture(scope="module")
def drafter(target, fitted):
    tables = load_file(target / "model.safetensors")
    return load_drafter(fitted, embedding=tables["model.embed_tokens.weight"],
                        lm_head=tables["lm_head.weight"], dtype=torch.float32)  # fmt: skip


@pytest.fixture(scope="module")
def answers(frozen) -> list[Recorded]:
    """Pieces that come again, in prompt, answer and behind it, with some noise, in all endings.

    One piece and all noise go on with usual successors, so that the drafter has its part.
    """
    numbers = random.Random(5)
    successor = (frozen.embedding @ frozen.head.T).argmax(-1).tolist()

    def usual(token: int, count: int) -> list[int]:
        return [token, *usual(successor[token], count - 1)] if count else []

    found = []
    for i in range(9):
        pieces = [[numbers.randrange(EOS) for _ in range(numbers.randrange(1, 9))],
                  usual(numbers.randrange(EOS), 4)]  # fmt: skip
        text: list[int] = []
        while len(text) < 80:
            text += numbers.choice(pieces)
            if numbers.random() < 0.5:
                text += usual(numbers.randrange(EOS), 3)
        prompt, end = numbers.randrange(1, 25), numbers.randrange(40, 60)
        found.append(Recorded(
            text[:prompt], text[prompt:end], None,
            (None, "stop", "length")[i % 3],
            None if i % 2 else end - prompt + numbers.randrange(6),
        ))  # fmt: skip
    loop = [7, 9, 7, 11, 13] * 20
    endless = Recorded(loop[:6], loop[6:64], None, "stop")
    return [*found, endless, Recorded([1, 2], [3])]


def slow(drafter, hidden, recorded: Recorded, setting: Setting, tokens: int, ahead: int = 0):
    """Draft, look up, merge, choose, compare, emit: one step after the other, by the definitions.

    Args:
        ahead: tokens of the future that the lookup sees, as if they had come first; the known one
            stays the last.
    """
    counts, said = Counts(), 1  # prefill says the first token
    known = recorded.prompt + recorded.answer
    deepest = 0
    while said < len(recorded.answer):
        left = None if recorded.limit is None else recorded.limit - said
        if left is not None and left < 2:
            break
        at = len(recorded.prompt) + said
        beams = beam_search(drafter, hidden[None, at - 2], torch.tensor([known[at - 1]]),
                            setting.beam_width, setting.draft_length)  # fmt: skip
        seen = (known[at - 1 : at + ahead] if ahead else []) + known[:at]
        chains = suffix_lookup(
            torch.tensor([seen], dtype=torch.int32), torch.tensor([0]), torch.tensor([0]),
            torch.tensor([len(seen)]), depth=tokens)  # fmt: skip
        limit = None if left is None else torch.tensor([left - 1])
        merged = merge_candidates(torch.tensor([known[at - 1]]), beams, chains,
                                  setting.num_nodes, limit)  # fmt: skip
        tree, chosen = choose_tree(merged, merged.counts)
        node, path = 0, []
        for wanted in known[at:-1]:
            children = [
                n
                for n in range(1, int(tree.num_nodes[0]))
                if int(tree.parents[0, n]) == node and int(tree.tokens[0, n]) == wanted
            ]
            if not children:
                break
            node = children[0]
            path.append(int(merged.sources[0, chosen[0, node]]))
        nodes = int(tree.num_nodes[0]) - 1
        counts.add(Counts(1, len(path), nodes, lookup=path.count(2), both=path.count(3)))
        deepest = max(deepest, len(path))
        said += len(path) + 1
    return counts, deepest


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_the_replay_is_a_step_by_step_decoding(frozen, drafter, answers, tokens, monkeypatch):
    monkeypatch.setattr(subject, "_CHUNK_LOGITS", 320 * 3 * 11)  # chunks that end within answers
    replayer = Replay(drafter, SETTINGS, "best", tokens)
    outcomes = replay(frozen, replayer, answers, group_tokens=130)
    total, deepest, ahead = Counts(), 0, 0
    for recorded, outcome in zip(answers, outcomes, strict=True):
        hidden = frozen.hidden([torch.tensor(recorded.prompt + recorded.answer)])[0]
        assert outcome.hits.shape == (2, 3)
        for setting in SETTINGS:
            expected, depth = slow(drafter, hidden, recorded, setting, tokens)
            mine = outcome.counts[setting]
            assert mine == expected, (setting, recorded)
            assert mine.by_source == expected.by_source
            assert min(mine.by_source.values()) >= 0
            total.add(mine)
            deepest = max(deepest, depth)
        # Negative control: a lookup that has seen the future.
        cheating, _ = slow(drafter, hidden, recorded, SETTINGS[1], tokens, ahead=9)
        ahead += cheating != outcome.counts[SETTINGS[1]]
    assert ahead > 5
    assert min(total.by_source.values()) > 10, total
    # Far deeper than the drafter's two tokens.
    assert deepest == {1: 2, 5: 5, 16: 16}[tokens]


def test_without_lookup_all_is_the_drafters(frozen, drafter, answers):
    for rule in ("best", "beams"):
        outcomes = replay(frozen, Replay(drafter, SETTINGS, rule), answers)
        counts = [outcome.counts[setting] for outcome in outcomes for setting in SETTINGS]
        assert any(one.accepted for one in counts)
        assert all(one.by_source["drafter"] == one.accepted for one in counts)
    with pytest.raises(ValueError, match="knows no lookup"):
        Replay(drafter, SETTINGS, "beams", 16)


def test_the_lookup_is_on_for_the_tree_that_allows_it():
    def options(**given):
        return EvalOptions("t", "d", "a", "o", **given)

    assert options().looked_up == 16
    assert options(lookup_tokens=5).looked_up == 5
    assert options(lookup=False).looked_up == 0
    assert options(tree="beams").looked_up == options(tree="beams", lookup=False).looked_up == 0
    with pytest.raises(TrainingError, match="give --tree best, or leave --lookup out"):
        options(tree="beams", lookup=True)


def test_the_report_says_who_drafted(tmp_path, target, fitted, answers, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(
        json.dumps({"prompt_token_ids": one.prompt, "token_ids": one.answer}) + "\n"
        for one in answers))  # fmt: skip
    command = ["eval", "--target", str(target), "--drafter", str(fitted), "--answers", str(file),
               "--settings", "3,2,7", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*command, "--lookup-tokens", "6"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    result = report["groups"][0]["settings"]["3,2,7"]
    by_source = result["accepted_by_source"]
    assert report["lookup_tokens"] == 6
    assert sum(by_source.values()) == result["accepted"] and by_source["lookup"] > 10
    text = (tmp_path / "out" / "report.md").read_text()
    shares = " / ".join(f"{by_source[name] / result['accepted']:.0%}"
                        for name in ("drafter", "lookup", "both"))  # fmt: skip
    assert f"| all | {shares} |" in text and "a lookup in the text itself (up to 6 tokens)" in text
    assert f"{by_source['lookup']} from lookup" in capsys.readouterr().out
    assert main([*command, "--no-lookup"]) == 0
    alone = json.loads((tmp_path / "out" / "report.json").read_text())
    assert alone["groups"][0]["settings"]["3,2,7"]["accepted"] < result["accepted"]
    assert "Who drafted" not in (tmp_path / "out" / "report.md").read_text()
    assert "from lookup" not in capsys.readouterr().out
