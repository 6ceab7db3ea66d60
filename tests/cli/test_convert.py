# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter convert`: what comes out drafts bit for bit as what went in."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_redrafter as vr
from vllm_redrafter.cli import main

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"
CASES = sorted(path.parent.name for path in CONFORMANCE.glob("*/oracle.npz"))


def tensors_of(case):
    return load_file(CONFORMANCE / case / "model.safetensors")


def pickled(case, directory, name="pytorch_model.bin", rename=lambda name: name, wrap=dict):
    """The case as an Apple directory whose weights are a pickle."""
    directory.mkdir()
    shutil.copy(CONFORMANCE / case / "config.json", directory)
    torch.save(wrap({rename(k): v for k, v in tensors_of(case).items()}), directory / name)
    return directory


def logits_of(drafter):
    """Logits and states of two evaluations on fixed inputs."""
    config = drafter.config
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(4, config.hidden_size, generator=generator)
    tokens = torch.randint(config.vocab_size, (2, 4), generator=generator)
    first, state = drafter(context, tokens[0], drafter.initial_state(4))
    second, state = drafter(context, tokens[1], state)
    return first, second, state


def assert_same_drafter(case, directory):
    embedding = load_file(CONFORMANCE / case / "embeddings.safetensors")["weight"]
    before = vr.load_drafter(CONFORMANCE / case, embedding=embedding)
    after = vr.load_drafter(directory, embedding=embedding)
    for ours, apples in zip(logits_of(after), logits_of(before), strict=True):
        assert torch.equal(ours, apples)
    assert after.config.defaults["top_k"] == before.config.defaults["top_k"] == 50
    return after


def error(capsys, *argv):
    """The one line on stderr of a command that must fail."""
    assert main(["convert", *map(str, argv)]) == 1
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text
    return text


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path, capsys):
    src = pickled(case, tmp_path / "apple")
    dst = tmp_path / "ours"
    assert main(["convert", str(src), str(dst)]) == 0
    assert f"wrote {dst}" in capsys.readouterr().out
    drafter = assert_same_drafter(case, dst)
    assert not drafter.config.apple
    assert sorted(path.name for path in dst.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "ours"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "my-drafter.pth"])
@pytest.mark.parametrize("as_file", [True, False])
def test_names_of_files(name, as_file, tmp_path):
    src = pickled("base", tmp_path / "apple", name)
    assert main(["convert", str(src / name if as_file else src), str(tmp_path / "ours")]) == 0
    assert_same_drafter("base", tmp_path / "ours")


def test_old_pickle_format(tmp_path):
    src = pickled("base", tmp_path / "apple")
    torch.save(tensors_of("base"), src / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter("base", tmp_path / "ours")


def test_shards(tmp_path):
    src = pickled("base", tmp_path / "apple")
    tensors = tensors_of("base")
    (src / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, src / file)
        weight_map |= dict.fromkeys(part, file)
    (src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter("base", tmp_path / "ours")


def test_bfloat16_and_shared_storage_are_kept(tmp_path):
    src = pickled("base", tmp_path / "apple")
    tensors = {name: t.to(torch.bfloat16) for name, t in tensors_of("base").items()}
    storage = torch.cat([t.flatten() for t in tensors.values()])
    views, start = {}, 0
    for name, t in tensors.items():
        views[name] = storage[start : start + t.numel()].view(t.shape)
        start += t.numel()
    torch.save(views, src / "pytorch_model.bin")
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(written[name], t) for name, t in tensors.items())


def tensorrt_plural(name):
    return name.replace("lm_head.", "lm_heads.").replace("input_proj.", "input_projs.")


def tensorrt_numbered(name):
    return name.replace("lm_head.", "lm_heads.0.").replace("input_proj.", "input_projs.0.")


def tensorrt_bare(name):
    return name.replace("lm_head.", "0.").replace("input_proj.", "input_projs.0.")


@pytest.mark.parametrize("case", ["base", "input_proj", "no_resblock", "no_rnn"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.drafter."])
@pytest.mark.parametrize("rename", [str, tensorrt_plural, tensorrt_numbered, tensorrt_bare])
def test_prefixes_and_other_spellings(case, prefix, rename, tmp_path):
    src = pickled(case, tmp_path / "apple", rename=lambda name: prefix + rename(name))
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter(case, tmp_path / "ours")


def test_a_training_checkpoint_with_the_target_in_it(tmp_path):
    def wrap(drafter):
        target = {"embed_tokens": {"weight": torch.zeros(2, 2)}, "layers.0.mlp": torch.ones(1)}
        return {"epoch": 3, "state_dict": {"llm": target, "drafter": drafter}}

    src = pickled("base", tmp_path / "apple", "model.pt", wrap=wrap)
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter("base", tmp_path / "ours")


def test_apples_unused_norm_is_dropped(tmp_path):
    src = pickled(
        "base", tmp_path / "apple", wrap=lambda t: {**t, "emb_norm.weight": torch.ones(16)}
    )
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter("base", tmp_path / "ours")


@pytest.mark.parametrize("case", CASES)
def test_without_config_json_the_shapes_decide(case, tmp_path):
    src = pickled(case, tmp_path / "apple")
    (src / "config.json").unlink()
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter(case, tmp_path / "ours")


def test_our_own_format_with_a_draft_vocabulary(tmp_path):
    src = pickled("base", tmp_path / "apple")
    config = json.loads((src / "config.json").read_text())
    config |= {"model_type": "redrafter", "draft_vocab_size": 10, "beam_width": 3}
    (src / "config.json").write_text(json.dumps(config))
    ids = torch.arange(5, 25, 2)
    tensors = tensors_of("base")
    tensors |= {"lm_head.2.weight": tensors["lm_head.2.weight"][ids], "draft_vocab": ids}
    torch.save(tensors, src / "pytorch_model.bin")
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    drafter = vr.load_drafter(tmp_path / "ours")
    assert torch.equal(drafter.draft_vocab, ids)
    assert drafter.config.defaults["beam_width"] == 3


def test_a_shared_head_stays_shared(tmp_path):
    src = pickled("base", tmp_path / "apple")
    config = json.loads((src / "config.json").read_text())
    config |= {"model_type": "redrafter", "shared_head": True, "exit_dim": 16}
    (src / "config.json").write_text(json.dumps(config))
    drafter = {
        "input_proj.weight": torch.ones(16, 32), "input_proj.bias": torch.ones(16),
        "rnn_u.weight": torch.ones(16, 16), "rnn_u.bias": torch.ones(16),
        "rnn_w.weight": torch.ones(16, 16),
    }  # fmt: skip
    for i in range(2):
        drafter |= {
            f"lm_head.{i}.linear.weight": torch.ones(16, 16),
            f"lm_head.{i}.linear.bias": torch.ones(16),
        }
    torch.save(drafter, src / "pytorch_model.bin")
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == drafter.keys()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["shared_head"] is True


def test_safetensors_with_other_names(tmp_path):
    src = pickled("base", tmp_path / "apple")
    (src / "pytorch_model.bin").unlink()
    save_file(
        {tensorrt_numbered(k): v for k, v in tensors_of("base").items()},
        src / "model.safetensors",
    )
    assert main(["convert", str(src), str(tmp_path / "ours")]) == 0
    assert_same_drafter("base", tmp_path / "ours")


def test_force(tmp_path, capsys):
    dst = tmp_path / "ours"
    assert main(["convert", str(pickled("base", tmp_path / "a")), str(dst)]) == 0
    written = (dst / "model.safetensors").read_bytes()
    src = pickled("no_resblock", tmp_path / "b")
    capsys.readouterr()
    assert "is not empty; give another directory, or --force" in error(capsys, src, dst)
    assert (dst / "model.safetensors").read_bytes() == written
    assert main(["convert", str(src), str(dst), "--force"]) == 0
    assert_same_drafter("no_resblock", dst)


def test_in_place_with_force(tmp_path):
    src = pickled("base", tmp_path / "apple")
    assert main(["convert", str(src), str(src), "--force"]) == 0
    assert_same_drafter("base", src)


class Malicious:
    """Unpickling this runs code: it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["beside the tensors", "plain pickle", "old format"])
def test_a_pickle_that_would_run_code_is_refused(form, tmp_path, capsys):
    trace = tmp_path / "code-ran"
    src = pickled("base", tmp_path / "apple")
    path = src / "pytorch_model.bin"
    content = {**tensors_of("base"), "x": Malicious(trace)}
    if form == "beside the tensors":
        torch.save(content, path)
    elif form == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    text = error(capsys, src, tmp_path / "ours")
    assert "is refused" in text and str(path) in text
    assert not trace.exists() and not (tmp_path / "ours").exists()
    # The same file does run code when it is trusted, so the refusal is what kept it from running.
    if form == "plain pickle":
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, -1])
def test_truncated_pickle(keep, old, tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    path = src / "pytorch_model.bin"
    torch.save(tensors_of("base"), path, _use_new_zipfile_serialization=not old)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    text = error(capsys, src, tmp_path / "ours")
    assert "is refused: it is damaged" in text or "it is truncated" in text
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("content", [b"not a pickle at all", b"\x80\x04N.", b"PK\x03\x04junk"])
def test_file_that_is_no_checkpoint(content, tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    (src / "pytorch_model.bin").write_bytes(content)
    text = error(capsys, src, tmp_path / "ours")
    assert str(src / "pytorch_model.bin") in text


def test_zip_that_is_no_checkpoint(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    with zipfile.ZipFile(src / "pytorch_model.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "cannot be read" in error(capsys, src, tmp_path / "ours")


def test_truncated_safetensors(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    content = (CONFORMANCE / "base" / "model.safetensors").read_bytes()
    (src / "model.safetensors").write_bytes(content[:-10])
    assert "it is truncated or not safetensors" in error(capsys, src, tmp_path / "ours")


def test_missing_source(tmp_path, capsys):
    text = error(capsys, tmp_path / "nowhere", tmp_path / "ours")
    assert "nowhere' does not exist; give a drafter's directory or weights file" in text


def test_source_without_weights(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    (src / "pytorch_model.bin").unlink()
    assert "holds no weights (.bin, .pt, .pth, .safetensors)" in error(capsys, src, tmp_path / "o")


def test_several_weight_files(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple", "a.pt")
    shutil.copy(src / "a.pt", src / "b.pt")
    assert "several weight files (a.pt, b.pt); give one" in error(capsys, src, tmp_path / "ours")


def test_destination_that_is_a_file(tmp_path, capsys):
    (tmp_path / "ours").write_text("x")
    src = pickled("base", tmp_path / "apple")
    assert "is a file; give the name of a directory" in error(capsys, src, tmp_path / "ours")


def test_weights_of_another_model(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple", wrap=lambda t: {"embed.weight": torch.ones(2, 2)})
    text = error(capsys, src, tmp_path / "ours")
    assert "holds no drafter: among its 1 tensors (such as embed.weight)" in text


def test_no_tensors(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple", wrap=lambda t: {"epoch": 3})
    assert "holds no tensors" in error(capsys, src, tmp_path / "ours")


def test_two_drafters(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple", wrap=lambda t: {"a": t, "b": t})
    assert "under several prefixes ('a.', 'b.')" in error(capsys, src, tmp_path / "ours")


def test_one_tensor_under_two_names(tmp_path, capsys):
    src = pickled(
        "input_proj", tmp_path / "apple",
        wrap=lambda t: {**t, "input_projs.0.weight": t["input_proj.weight"]},
    )  # fmt: skip
    assert "holds the tensor input_proj.weight twice" in error(capsys, src, tmp_path / "ours")


def test_surplus_tensor(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple", wrap=lambda t: {**t, "norm.weight": torch.ones(3)})
    assert "norm.weight, which is no tensor of a recurrent" in error(capsys, src, tmp_path / "ours")


def test_config_that_does_not_fit(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    shutil.copy(CONFORMANCE / "no_resblock" / "config.json", src)
    text = error(capsys, src, tmp_path / "ours")
    assert "the config and the weights do not belong together" in text
    assert not (tmp_path / "ours").exists()


def test_config_of_another_model(tmp_path, capsys):
    src = pickled("base", tmp_path / "apple")
    (src / "config.json").write_text('{"model_type": "llama"}')
    assert "has model_type 'llama'" in error(capsys, src, tmp_path / "ours")


def test_help_names_both_arguments(capsys):
    with pytest.raises(SystemExit) as left:
        main(["convert", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "SRC" in text and "DST" in text and "--force" in text
