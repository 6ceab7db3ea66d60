# SPDX-License-Identifier: Apache-2.0
"""Making data: prompts, filters, shards, and runs that were stopped. Engines are fakes here."""

from __future__ import annotations

import errno
import json

import pytest
from tiny_models import EOS
from training_cases import FakeEngine, write_chat_target, write_prompts

from vllm_redrafter.cli import main
from vllm_redrafter.training import files
from vllm_redrafter.training.data import generate_dataset, why_drop
from vllm_redrafter.training.dataset import MANIFEST, load_dataset
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import sha256
from vllm_redrafter.training.generate import Answer
from vllm_redrafter.training.options import DataOptions
from vllm_redrafter.training.prompts import ChatTokens, from_rows, parse_conversation, read_prompts
from vllm_redrafter.training.repeats import repeated_share


def options(target, out, prompts=None, **fields) -> DataOptions:
    usual = {"shard_size": 4, "max_model_len": 200, "max_tokens": 50}
    return DataOptions(str(target), str(out), str(prompts) if prompts else None,
                       **{**usual, **fields})  # fmt: skip


def manifest_of(out):
    return json.loads((out / MANIFEST).read_text())


def test_a_file_of_prompts_becomes_a_dataset(tmp_path, target):
    engine, counts = FakeEngine(), []
    manifest = generate_dataset(
        options(target, tmp_path / "d", write_prompts(tmp_path / "p.jsonl", 10)),
        start=engine.start,
        progress=lambda done, total, dropped: counts.append((done, total)),
    )
    assert counts == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert engine.stopped and manifest == manifest_of(tmp_path / "d")
    assert manifest["complete"] and manifest["totals"]["sequences"] == 10
    assert manifest["seed"] == 0 and manifest["versions"]["torch"]
    for entry in manifest["shards"]:
        assert sha256((tmp_path / "d" / entry["file"]).read_bytes()) == entry["sha256"]
    text = json.dumps(manifest)
    assert str(tmp_path) not in text and str(target.parent) not in text
    # Temperatures in turn, the template around every prompt, prompts not counted as answers.
    requests = [request for call in engine.calls for request in call]
    assert [r.temperature for r in requests] == [0.0, 0.7, 1.0] * 3 + [0.0]
    dataset = load_dataset(tmp_path / "d")
    words = ChatTokens(target).tokenizer.decode(dataset.tokens[1][~dataset.answer[1]])
    assert words == "[user]question 1?<eos>[assistant]"
    assert int(dataset.tokens[1][-1]) == EOS and int(dataset.answer[1].sum()) == 25


def test_broken_lines_are_named_counted_and_skipped(tmp_path, target):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "one?"}\n{"prompt": \n\n{"text": "x"}\n{"prompt": ""}\n[1]\n'
        '{"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "x"}]}'
        '\n{"messages": [{"role": "robot", "content": "x"}]}\n{"prompt": " ONE? "}\n'
    )
    said = []
    manifest = generate_dataset(
        options(target, tmp_path / "d", path), start=FakeEngine().start, say=said.append
    )
    assert manifest["totals"]["sequences"] == 2
    assert manifest["source"]["skipped_lines"] == 5 and manifest["source"]["duplicates"] == 1
    assert [text.split(":")[0] for text in said] == [f"skipped line {n}" for n in (2, 4, 5, 6, 8)]
    assert 'neither "prompt" nor "messages"' in said[1]


def test_nothing_but_broken_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("{\n{}\n")
    with pytest.raises(TrainingError, match="no line of .*line 1: not JSON"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(TrainingError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_rows_of_a_hub_dataset():
    talk = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    found = from_rows([{"id": 1, "conversations": talk}, {"id": 2, "conversations": talk}], None, 9)
    assert found.conversations == [[{"role": "user", "content": "a?"}]] and found.duplicates == 1
    assert len(from_rows([{"q": "one"}, {"q": "two"}], "q", 1).conversations) == 1
    with pytest.raises(TrainingError, match="columns id, of which none is known"):
        from_rows([{"id": 1}], None, 9)


def test_a_missing_package_for_the_hub(tmp_path, target, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TrainingError, match="needs the package `datasets`: pip install datasets"):
        generate_dataset(options(target, tmp_path / "d", hf_dataset="x"), start=FakeEngine().start)


def test_a_target_without_a_chat_template(tmp_path):
    bare = write_chat_target(tmp_path / "bare", template=None)
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    with pytest.raises(TrainingError, match="no chat template; give --raw"):
        generate_dataset(options(bare, tmp_path / "d", prompts), start=FakeEngine().start)
    with pytest.raises(TrainingError, match="--raw needs prompts"):
        generate_dataset(options(bare, tmp_path / "d", raw=True), start=FakeEngine().start)
    manifest = generate_dataset(
        options(bare, tmp_path / "d", prompts, raw=True), start=FakeEngine().start
    )
    assert manifest["totals"]["sequences"] == 3
    dataset = load_dataset(tmp_path / "d")
    assert bytes(dataset.tokens[0][~dataset.answer[0]].tolist())  # the bare prompt, no roles
    assert int((~dataset.answer[0]).sum()) == len("question 0?")


def test_the_target_invents_prompts(tmp_path, target):
    engine = FakeEngine()
    manifest = generate_dataset(options(target, tmp_path / "d", num_prompts=6), start=engine.start)
    inventions, answers = engine.calls[0], engine.calls[1]
    assert manifest["source"] == {"kind": "invented"} and manifest["totals"]["sequences"] == 6
    chat = ChatTokens(target)
    assert {chat.tokenizer.decode(r.prompt) for r in inventions} == {"[user]"}
    assert inventions[0].temperature == 0.9 and inventions[0].stop_ids == (EOS,)
    shown = chat.tokenizer.decode(answers[0].prompt)
    assert shown.startswith("[user]") and shown.endswith("<eos>[assistant]") and len(shown) > 30


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, target):
    prompts, out = write_prompts(tmp_path / "p.jsonl", 10), tmp_path / "d"
    first = FakeEngine(fail_at=2, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        generate_dataset(options(target, out, prompts), start=first.start)
    assert first.stopped and not manifest_of(out)["complete"]
    assert [e["number"] for e in manifest_of(out)["shards"]] == [0, 1]
    # A shard that was written but not yet recorded, and one that rotted.
    (out / "data-00002.safetensors").write_bytes(b"half")
    (out / "data-00001.safetensors").write_bytes(b"rotten")
    second, said = FakeEngine(), []
    manifest = generate_dataset(options(target, out, prompts), start=second.start, say=said.append)
    assert len(second.calls) == 2 and "data-00001" in said[0]
    assert manifest["totals"]["sequences"] == 10
    whole = FakeEngine()
    again = generate_dataset(options(target, tmp_path / "e", prompts), start=whole.start)
    hashes = [[e["sha256"] for e in m["shards"]] for m in (manifest, again)]
    assert hashes[0] == hashes[1]
    # Complete: nothing starts.
    assert generate_dataset(options(target, out, prompts), start=None)["complete"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seed": 1}, "begun with seed 0, now it is 1"),
        ({"max_tokens": 40}, "begun with max_tokens 50, now it is 40"),
        ({"num_prompts": 5}, "begun with"),
    ],
)
def test_a_run_with_other_options_is_refused(tmp_path, target, fields, message):
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    generate_dataset(options(target, tmp_path / "d", prompts), start=FakeEngine().start)
    with pytest.raises(TrainingError, match=message):
        generate_dataset(options(target, tmp_path / "d", prompts, **fields), start=None)


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, target, monkeypatch):
    prompts, out = write_prompts(tmp_path / "p.jsonl", 12), tmp_path / "d"
    real, count = files.os.fsync, []

    def full(fd):
        count.append(fd)
        if len(count) > 4:  # manifest, then shard and manifest, then the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TrainingError, match="the disk is full; everything that was finished"):
        generate_dataset(options(target, out, prompts), start=FakeEngine().start)
    monkeypatch.undo()
    assert [e["number"] for e in manifest_of(out)["shards"]] == [0]
    assert len(load_dataset(out)) == 4
    assert not list(out.glob(".*.tmp"))
    engine = FakeEngine()
    assert generate_dataset(options(target, out, prompts), start=engine.start)["complete"]
    assert len(engine.calls) == 2 and len(load_dataset(out)) == 12


def test_two_runs_cannot_write_one_directory(tmp_path, target):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    (tmp_path / "d").mkdir()
    with files.locked(tmp_path / "d", "a dataset"):
        with pytest.raises(TrainingError, match="another run writes a dataset"):
            generate_dataset(options(target, tmp_path / "d", prompts), start=None)


def test_repeated_answers_are_kept_once(tmp_path, target):
    class Parrot(FakeEngine):
        def generate(self, requests, seed):
            self.calls.append(requests)
            return [Answer(list(range(20)), True) for _ in requests]

    manifest = generate_dataset(
        options(target, tmp_path / "d", write_prompts(tmp_path / "p.jsonl", 6)),
        start=Parrot().start,
    )
    assert manifest["totals"]["sequences"] == 1
    assert manifest["totals"]["dropped"] == {"duplicate": 5}


def test_filters(tmp_path, target):
    given = options(target, tmp_path, only_ended=True, min_tokens=5)
    assert why_drop(Answer([1, 2, 3], True), given) == "too short"
    assert why_drop(Answer(list(range(9)), False), given) == "cut off"
    assert why_drop(Answer([1, 2] * 20, True), given) == "repetitive"
    assert why_drop(Answer(list(range(9)), True), given) is None
    # Exactly the share that is allowed, 6 of 20 8-grams, which rounding puts above 0.3.
    allowed = [*range(14), *range(13)]
    assert repeated_share(allowed) > given.max_repeats == 0.3
    assert why_drop(Answer(allowed, True), given) is None


def test_nothing_passes_the_filters(tmp_path, target):
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    with pytest.raises(TrainingError, match="not one answer passed the filters.*too short"):
        generate_dataset(
            options(target, tmp_path / "d", prompts, min_tokens=40), start=FakeEngine().start
        )


def test_prompts_that_leave_no_room(tmp_path, target):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 300}) + '\n{"prompt": "short one"}\n')
    manifest = generate_dataset(options(target, tmp_path / "d", path), start=FakeEngine().start)
    assert manifest["totals"]["dropped"] == {"prompt too long": 1}


def test_conversations_end_with_the_users_turn():
    turns = [
        {"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")
    ]
    assert parse_conversation({"messages": turns}) == turns[:4]
    with pytest.raises(ValueError, match="no user's turn"):
        parse_conversation({"messages": turns[:1]})


def test_the_command_says_what_is_wrong(tmp_path, target, capsys):
    assert main(["data", "--target", str(target)]) == 1
    assert "error: --out is missing" in capsys.readouterr().err
    assert main(["data", "--target", str(tmp_path / "no"), "--out", str(tmp_path / "d")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "--dtype", "int8"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("targt: x\n", "unknown name 'targt'; did you mean 'target'"),
        ("seed: one\n", "seed is 'one'; it must be int"),
        ("raw: 1\n", "raw is 1; it must be bool"),
        ("- x\n", "must hold lines of the form"),
        ("a: [\n", "cannot be read"),
        ("temperatures: [0, -1]\ntarget: x\nout: y\n", "--temperatures is -1"),
    ],
)
def test_yaml_files_that_do_not_fit(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["data", "--config", str(tmp_path / "c.yaml")]) == 1
    assert message in capsys.readouterr().err
