# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the replay is a plain decoding loop's, counts are vLLM's, broken input is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, greedy_rollouts, random_drafter, write_fitted_drafter
from tiny_models import write_random_drafter as write_random

from vllm_redrafter.cli import main
from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.drafter.checkpoint import load_drafter, save_drafter
from vllm_redrafter.training import costs as costs_module
from vllm_redrafter.training import evaluate as subject
from vllm_redrafter.training import replay as replay_module
from vllm_redrafter.training.answers import Recorded, read_answers
from vllm_redrafter.training.costs import Costs
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.eval_report import summed
from vllm_redrafter.training.evaluate import evaluate
from vllm_redrafter.training.options import EvalOptions
from vllm_redrafter.training.replay import Counts, Replay, Setting
from vllm_redrafter.training.target import Target
from vllm_redrafter.tree.build import build_tree

SETTINGS = ("1,3,3", "4,3,7", "3,2,6", "2,4,5")
PROMPT = 2


@pytest.fixture(scope="module")
def answers(target) -> list[Recorded]:
    """Greedy answers of different lengths, one of them a single token."""
    texts, _ = greedy_rollouts(target, rows=8, length=30, seed=11)
    ends = [PROMPT + 1, PROMPT + 2, PROMPT + 3, 20, 25, 30, 30, 30]
    return [
        Recorded(text[:PROMPT].tolist(), text[PROMPT:end].tolist(), "even" if i % 2 == 0 else "odd")
        for i, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]


@pytest.fixture(scope="module")
def fitted(target, tmp_path_factory) -> Path:
    return write_fitted_drafter(tmp_path_factory.mktemp("eval") / "fitted", target, steps=150)


def write_answers(path: Path, answers: list[Recorded]) -> Path:
    lines = [{"prompt_token_ids": a.prompt, "token_ids": a.answer, "category": a.category}
             for a in answers]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bound(target: Path, directory: Path):
    tables = load_file(target / "model.safetensors")
    return load_drafter(directory, embedding=tables["model.embed_tokens.weight"],
                        lm_head=tables["lm_head.weight"], dtype=torch.float32)  # fmt: skip


def write_context_drafter(directory: Path, target: Path) -> Path:
    """Guesses from the hidden state alone: the usual successor of the token that it predicts.

    The fitted drafter reads little but tokens, so a wrong hidden state would not show there.
    """
    tables = load_file(target / "model.safetensors")
    head, embedding = tables["lm_head.weight"], tables["model.embed_tokens.weight"]
    successor = (embedding[:EOS] @ head.T).argmax(-1)
    drafter = random_drafter(num_draft_layers=0, rnn=False)
    with torch.no_grad():
        drafter.input_proj.weight.copy_(torch.eye(64, 128))
        drafter.input_proj.bias.zero_()
        drafter.lm_head[0].weight.zero_()[successor] = head[:EOS]
    save_drafter(drafter, directory)
    return directory


def slow_replay(drafter, hidden, recorded: Recorded, setting: Setting, rule: str) -> Counts:
    """Decode step by step as an engine would: draft, build, compare, emit."""
    text = recorded.prompt + recorded.answer
    said = len(recorded.prompt) + 1  # prefill says the first token
    counts = Counts()
    while said < len(text):
        beams = beam_search(drafter, hidden[None, said - 2], torch.tensor([text[said - 1]]),
                            setting.beam_width, setting.draft_length)  # fmt: skip
        tree = build_tree(beams, rule, setting.num_nodes)
        node = accepted = 0
        nodes = int(tree.num_nodes[0])
        # The last token ends the answer, drafted or not.
        while said + accepted < len(text) - 1:
            children = [n for n in range(1, nodes) if int(tree.parents[0, n]) == node
                        and int(tree.tokens[0, n]) == text[said + accepted]]  # fmt: skip
            if not children:
                break
            node, accepted = children[0], accepted + 1
        counts.add(Counts(1, accepted, nodes - 1))
        said += accepted + 1
    return counts


@pytest.mark.parametrize("rule", ["best", "beams"])
@pytest.mark.parametrize("kind", ["fitted", "context", "random", "cut"])
def test_the_replay_is_a_step_by_step_decoding(
    tmp_path, target, answers, fitted, rule, kind, monkeypatch
):
    monkeypatch.setattr(
        replay_module, "_CHUNK_LOGITS", 320 * 4 * 9
    )  # chunks that end within answers
    directory = fitted
    if kind == "random":
        directory = write_random(tmp_path / "random")
    if kind == "context":
        directory = write_context_drafter(tmp_path / "context", target)
    if kind == "cut":  # a draft vocabulary: rows of the head are not token ids
        drafter = random_drafter(draft_vocab_size=100)
        drafter.draft_vocab = torch.randperm(EOS)[:100]
        save_drafter(drafter, directory := tmp_path / "cut")
    settings = subject.parse_settings(SETTINGS)
    drafter = bound(target, directory)
    frozen = Target(target, "float32", torch.device("cpu"))
    outcomes = replay_module.replay(
        frozen, Replay(drafter, settings, rule), answers, group_tokens=70
    )
    total = 0
    for recorded, outcome in zip(answers, outcomes, strict=True):
        hidden = frozen.hidden([torch.tensor(recorded.prompt + recorded.answer)])[0]
        assert outcome.agreeing == len(recorded.answer)
        for setting in settings:
            expected = slow_replay(drafter, hidden, recorded, setting, rule)
            assert outcome.counts[setting] == expected, (setting, recorded)
            total += expected.accepted
        # The teacher-forced guesses, one position at a time.
        wanted = torch.zeros(4, 3, dtype=torch.int64)
        for p in range(len(recorded.answer) - 1):
            context, state = hidden[len(recorded.prompt) - 1 + p], drafter.initial_state()
            for depth, (fed, truth) in enumerate(
                zip(recorded.answer[p : p + 4], recorded.answer[p + 1 : p + 5], strict=False)
            ):
                logits, state = drafter(context, torch.tensor(fed), state)
                best = drafter.to_target_ids(logits.argsort(descending=True)[:5]).tolist()
                wanted[depth] += torch.tensor([1, best[0] == truth, truth in best])
        assert torch.equal(outcome.hits, wanted)
    assert (total > 100) == (kind in ("fitted", "context"))


def test_counting_by_hand():
    # Known tokens at 0 (2 accepted), 3 (none), 4 (1 accepted).
    counts = replay_module.steps_of([2, 9, 9, 0, 1], [3, 9, 9, 2, 1])
    assert counts == Counts(drafts=3, accepted=3, nodes=6)
    assert counts.acceptance_length == 2
    assert replay_module.steps_of([], []) == Counts()


def chain_from_5():
    """Setting, ``Replay.accepted``, a context and the chain 5, ... that is drafted from it."""
    drafter = random_drafter()
    drafter.embedding = torch.randn(320, 64)
    context = torch.randn(1, 64)
    beams = beam_search(drafter, context, torch.tensor([5]), 1, 3)
    setting = Setting(1, 3, 3)
    accept = Replay(drafter, [setting], "best").accepted
    return setting, accept, context, [5, *beams.tokens[0, :, 0].tolist()]


def test_nothing_is_accepted_behind_the_end():
    assert replay_module.following_tokens([5, 6, 7], 2).tolist() == [[5, 6, 7, -1], [6, 7, -1, -1]]
    # A drafter that always says what comes next would go on: the answer 5 6 7 ends it.
    setting, accept, context, chain = chain_from_5()
    for length in (2, 3, 4):
        table = replay_module.following_tokens(chain[:length], 3)[:1]
        verified = accept(context, table)[setting]
        assert [int(verified.accepted), int(verified.nodes)] == [length - 1, 3]
        assert verified.sources.tolist() == [[length - 1, 0, 0]]


def test_the_end_counts_as_in_vllm():
    # Drafts behind 5, 6 and 7; a request that max_tokens ends skips the last.
    said = [5, 6, 7, 8]
    assert [Recorded([1], said[:n], finish_reason="length").drafting_positions
            for n in (1, 2, 4)] == [0, 0, 2]  # fmt: skip
    for reason in (None, "stop"):
        assert [Recorded([1], said[:n], finish_reason=reason).drafting_positions
                for n in (1, 2, 4)] == [0, 1, 3]  # fmt: skip
    # An answer that stops with its last possible token makes no draft for that one either.
    assert [Recorded([1], said, finish_reason="stop", max_tokens=n).drafting_positions
            for n in (4, 5, 9)] == [2, 3, 3]  # fmt: skip


def test_trees_are_no_deeper_than_what_may_still_be_said():
    said = [5, 6, 7, 8, 9]
    # 5 is known, 4 may follow, of which the target says the last one itself.
    ended = Recorded([1], said, finish_reason="length", max_tokens=50)
    assert replay_module.depth_limits(ended, 16).tolist() == [3, 2, 1, 0]
    stopped = Recorded([1], said, finish_reason="stop", max_tokens=8)
    assert replay_module.depth_limits(stopped, 16).tolist() == [6, 5, 4, 3]
    assert replay_module.depth_limits(Recorded([1], said), 16).tolist() == [16] * 4
    # A chain of three that is right throughout.
    setting, accept, context, chain = chain_from_5()
    table = replay_module.following_tokens(chain, 3)[:1]
    for limit in range(4):
        verified = accept(context, table, limits=torch.tensor([limit]))[setting]
        assert (int(verified.accepted), int(verified.nodes)) == (limit, limit)


def test_shuffled_weights_and_a_wrong_offset_accept_less(tmp_path, target, answers, fitted):
    texts, _ = greedy_rollouts(target, rows=16, length=40, seed=12)
    recorded = [Recorded(t[:PROMPT].tolist(), t[PROMPT:].tolist()) for t in texts]
    setting = Setting(4, 3, 7)
    frozen = Target(target, "float32", torch.device("cpu"))

    def length(directory: Path, offset: int = 0) -> float:
        shifted = Target(target, "float32", torch.device("cpu"))
        shifted.hidden = lambda seqs: [s.roll(offset, 0) for s in frozen.hidden(seqs)]
        replayer = Replay(bound(target, directory), [setting], "best")
        return summed(replay_module.replay(shifted, replayer, recorded), setting).acceptance_length

    tensors = load_file(fitted / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        name: t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape)
        for name, t in tensors.items()
    }
    (tmp_path / "shuffled").mkdir()
    save_file(shuffled, tmp_path / "shuffled" / "model.safetensors")
    (tmp_path / "shuffled" / "config.json").write_text((fitted / "config.json").read_text())
    right = length(fitted)
    assert right > 2 and length(tmp_path / "shuffled") < 1.2
    context = write_context_drafter(tmp_path / "context", target)
    assert length(context) > 1.5 and length(context, 1) < 1.2 and length(context, -1) < 1.2


def test_costs_by_hand(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"plain_ms": 30, "draft_ms": {"4, 3": 2, "1,3": 1},
                                "rows_ms": {"8": 40, "1": 30, "4": 32}}))  # fmt: skip
    costs = costs_module.read_costs(path)
    assert costs == Costs(30, {(4, 3): 2, (1, 3): 1}, ((1, 30), (4, 32), (8, 40)))
    assert [costs.rows_ms(r) for r in (1, 2.5, 4, 6, 8)] == [30, 31, 32, 36, 40]
    # 5 nodes a draft: 6 rows, 36 ms, and 2 for the draft; 1.9 tokens in 38 ms against 30 each.
    step, speed_up = costs.speed_up(Setting(4, 3, 7), Counts(drafts=10, accepted=9, nodes=50))
    assert step == 38 and speed_up == pytest.approx(1.5)
    with pytest.raises(TrainingError, match="for 1 to 8 rows, but 9.00 are needed"):
        costs.rows_ms(9)
    with pytest.raises(TrainingError, match="no draft_ms for '8,3'"):
        costs.draft_ms(Setting(8, 3, 7))
    assert Costs(30, 1.5, ((1, 30),)).draft_ms(Setting(8, 3, 7)) == 1.5


@pytest.mark.parametrize("value, message", [
    ({"draft_ms": 1, "rows_ms": {"1": 2}}, "plain_ms is missing"),
    ({"plain_ms": 0, "draft_ms": 1, "rows_ms": {"1": 2}}, "0 is not a time"),
    ({"plain_ms": 1, "draft_ms": 1, "rows_ms": {}}, "rows_ms is empty"),
    ({"plain_ms": 1, "draft_ms": {"4": 1}, "rows_ms": {"1": 2}}, "not of the form"),
    ([1], "not of the form"),
])  # fmt: skip
def test_costs_of_another_form(tmp_path, value, message):
    (tmp_path / "costs.json").write_text(json.dumps(value))
    with pytest.raises(TrainingError, match=message):
        costs_module.read_costs(tmp_path / "costs.json")


def test_recommendation():
    entries = [{"setting": "1,3,3", "speed_up": 1.2}, {"setting": "4,3,7", "speed_up": 1.4}]
    assert costs_module.recommend(entries)["setting"] == "4,3,7"
    none = costs_module.recommend([{"setting": "1,3,3", "speed_up": 0.8}])
    assert none["setting"] is None and "none is predicted to be faster" in none["why"]
    assert "no costs were given" in costs_module.recommend([])["why"]


def test_looping():
    assert Recorded([1], [1, 2, 3, 4] * 10).looping
    assert not Recorded([1], list(range(40))).looping
    # 20 8-grams of which 6 (30 %) came before: not more than 30 %.
    assert not Recorded([1], [*range(14), *range(13)]).looping
    assert Recorded([1], [*range(13), *range(13)]).looping  # 6 of 19


def test_the_command_and_its_files(tmp_path, target, answers, fitted, capsys, monkeypatch):
    loop = Recorded(answers[7].prompt, [5, 6] * 20, "odd | one")
    file = write_answers(tmp_path / "answers.jsonl", [*answers, loop])
    costs = tmp_path / "costs.json"
    costs.write_text('{"plain_ms": 10, "draft_ms": 1, "rows_ms": {"1": 10, "16": 11}}')
    monkeypatch.setattr(subject, "can_plot", lambda: False)
    command = ["eval", "--target", str(target), "--drafter", str(fitted), "--answers", str(file),
               "--settings", *SETTINGS, "--tree", "beams",
               "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*command, "--costs", str(costs)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert list(groups) == ["all", "not looping", "looping", "even", "odd", "odd | one"]
    assert [group["answers"] for group in groups.values()] == [9, 8, 1, 4, 4, 1]
    for part in ("drafts", "accepted"):
        total = groups["all"]["settings"]["4,3,7"][part]
        assert total == sum(
            groups[n]["settings"]["4,3,7"][part] for n in ("looping", "not looping")
        )
        assert total == sum(
            groups[n]["settings"]["4,3,7"][part] for n in ("even", "odd", "odd | one")
        )
    one = groups["all"]["settings"]["4,3,7"]
    assert one["acceptance_length"] == 1 + one["accepted"] / one["drafts"]
    assert groups["not looping"]["depths"][0]["top1"] > 0.3
    assert all(d["top1"] <= d["top5"] for g in groups.values() for d in g["depths"])
    best = max(report["predictions"], key=lambda p: p["speed_up"])
    assert report["recommendation"]["setting"] == best["setting"]
    out = capsys.readouterr().out
    assert "Recommended is " + best["setting"] in out and "predicted speed-up" in out
    assert "warning: only " in out  # the looping answer is not the target's
    text = (tmp_path / "out" / "report.md").read_text()
    assert "odd \\| one" in text and "No acceptance.png: it needs `matplotlib`" in text
    assert not (tmp_path / "out" / "acceptance.png").exists()
    assert main(command) == 0
    assert "no costs were given" in (tmp_path / "out" / "report.md").read_text()


def test_the_picture(tmp_path, target, answers, fitted):
    import matplotlib  # noqa: F401 - the extra `train`, which scripts/test.sh installs

    file = write_answers(tmp_path / "answers.jsonl", answers)
    evaluate(EvalOptions(str(target), str(fitted), str(file), str(tmp_path), settings=("4,3,7",)))
    assert "](acceptance.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "acceptance.png").read_bytes().startswith(b"\x89PNG")


def test_costs_that_lack_a_setting_are_told_before_the_replay(tmp_path, target, fitted):
    costs = tmp_path / "costs.json"
    costs.write_text('{"plain_ms": 10, "draft_ms": 1, "rows_ms": {"1": 10, "6": 11}}')
    options = EvalOptions(str(target), str(fitted), "none", str(tmp_path), settings=("4,3,7",),
                          costs=str(costs))  # fmt: skip
    with pytest.raises(TrainingError, match="but 8.00 are needed"):
        evaluate(options)


def table(tmp_path, node_ms):
    """A file of `vllm-redrafter calibrate`: a step of 10 ms, each node more, a draft of 1 ms."""
    seconds = [[n, 0.01 + node_ms / 1e3 * (n - 1)] for n in (1, 2, 16)]
    drafts = {"1,3": [[1, 0.001]], "4,3": [[1, 0.001]]}
    file = tmp_path / f"costs{node_ms}.json"
    file.write_text(json.dumps({"format": 1, "identity": {}, "rows_seconds": seconds,
                                "draft_seconds": drafts, "attention_seconds": 0.0}))  # fmt: skip
    return file


def test_a_budget_takes_the_nodes_that_pay(tmp_path, target, answers, fitted):
    file = write_answers(tmp_path / "answers.jsonl", answers)
    given = (str(target), str(fitted), str(file))
    setting, results = "4,3,7", {}
    for node_ms in (0.001, 3.0, 30.0):
        out = str(tmp_path / f"out{node_ms}")
        report = evaluate(EvalOptions(*given, out, settings=(setting,), node_budget="auto",
                                      costs=str(table(tmp_path, node_ms))))  # fmt: skip
        [prediction] = report["predictions"]
        results[node_ms] = report["groups"][0]["settings"][setting], prediction
    free, dear, never = results.values()
    fixed = evaluate(EvalOptions(*given, str(tmp_path / "fixed"), settings=(setting,),
                                 costs=str(table(tmp_path, 3.0))))  # fmt: skip
    all_nodes = fixed["groups"][0]["settings"][setting]
    # Nodes for nothing: all that are likely enough. Dear ones: fewer, and faster so.
    assert all_nodes["nodes_per_draft"] >= free[0]["nodes_per_draft"] > dear[0]["nodes_per_draft"]
    assert free[0]["acceptance_length"] > dear[0]["acceptance_length"] > 1
    assert dear[1]["speed_up"] > fixed["predictions"][0]["speed_up"]
    # Too dear: none, and a step costs what its draft costs besides.
    assert never[0]["nodes_per_draft"] == never[0]["accepted"] == 0
    assert never[1]["step_ms"] == pytest.approx(11) and never[1]["speed_up"] < 1


def test_a_budget_needs_measured_times(tmp_path):
    with pytest.raises(TrainingError, match="--node-budget auto weighs nodes by measured times"):
        EvalOptions("t", "d", "a", str(tmp_path), node_budget="auto")
    broken = tmp_path / "broken.json"
    broken.write_text('{"format": 1}')
    with pytest.raises(TrainingError, match="it is no cost table"):
        costs_module.read_costs(broken)


GOOD = '{"prompt_token_ids": [1], "token_ids": [2, 3]}'


@pytest.mark.parametrize("line, message", [
    ('{"prompt', "line 3: not JSON"),
    ("[1]", "line 3: this is list, not a JSON object"),
    ('{"prompt_token_ids": [1]}', "line 3: token_ids must be a list of whole numbers"),
    ('{"prompt_token_ids": [1], "token_ids": [true]}', "line 3: token_ids must be a list"),
    ('{"prompt_token_ids": [1], "token_ids": []}', "line 3: token_ids is empty"),
    ('{"prompt_token_ids": [], "token_ids": [1]}', "line 3: prompt_token_ids is empty"),
    ('{"prompt_token_ids": [1], "token_ids": [320]}', "line 3: token_ids has the id 320, but"),
    ('{"prompt_token_ids": [-1], "token_ids": [2]}', "line 3: prompt_token_ids has the id -1"),
    ('{"prompt_token_ids": [1], "token_ids": [2], "category": 3}', "line 3: category is 3"),
    ('{"prompt_token_ids": [1], "token_ids": [2], "finish_reason": "end"}',
     "line 3: finish_reason is 'end'"),
    ('{"prompt_token_ids": [1], "token_ids": [2, 3], "max_tokens": 1}', "line 3: max_tokens is 1;"),
    ('{"prompt_token_ids": [1], "token_ids": [2], "max_tokens": true}', "max_tokens is True;"),
])  # fmt: skip
def test_broken_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(TrainingError, match=message):
        read_answers(tmp_path / "a.jsonl", 320)


def test_files_without_anything_to_draft(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(TrainingError, match="cannot be read"):
        read_answers(path, 320)
    path.write_text("\n")
    with pytest.raises(TrainingError, match="holds no answers"):
        read_answers(path, 320)
    path.write_text('{"prompt_token_ids": [1], "token_ids": [2]}')
    with pytest.raises(TrainingError, match="no answer has two tokens"):
        read_answers(path, 320)


@pytest.mark.parametrize("text", ["4,3", "4,3,x", "0,3,3", "4,3,0"])
def test_settings_of_another_form(text):
    with pytest.raises(TrainingError, match="a setting is W,L,N"):
        subject.parse_settings([text])


@pytest.mark.parametrize("fields, message", [
    ({"hidden_size": 32}, "has hidden_size 32, but"),
    ({"vocab_size": 400, "draft_vocab_size": 400}, "has vocab_size 400, but"),
])  # fmt: skip
def test_a_drafter_of_another_target(tmp_path, target, fields, message):
    (tmp_path / "a.jsonl").write_text(GOOD)
    write_random(tmp_path / "other", **fields)
    options = EvalOptions(str(target), str(tmp_path / "other"), str(tmp_path / "a.jsonl"),
                          str(tmp_path / "out"))  # fmt: skip
    with pytest.raises(TrainingError, match=message):
        evaluate(options)
    assert main(["eval", "--target", str(target), "--drafter", str(tmp_path / "none"), "--answers",
                 str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 1  # fmt: skip
