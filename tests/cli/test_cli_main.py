# SPDX-License-Identifier: Apache-2.0
"""The command itself, and the scripts around it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_redrafter
from vllm_redrafter import cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and text in out for name, text in cli.COMMANDS.items())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert f"vllm-redrafter {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["dance"]])
def test_unknown_commands_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "command" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-redrafter {vllm_redrafter.__version__}"


def test_help_needs_no_heavy_imports():
    code = (
        "import sys\n"
        "from vllm_redrafter import cli\n"
        "try: cli.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


def test_there_are_scripts():
    assert [path.name for path in SCRIPTS] == ["demo.sh", "install.sh", "serve.sh", "test.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_install_refuses_an_unfit_python(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": "/no/such/python",
           "VLLM_REDRAFTER_VENV": str(tmp_path / "venv")}  # fmt: skip
    done = subprocess.run(
        [ROOT / "scripts" / "install.sh"], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "PYTHON=/no/such/python is not a Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_install_says_when_there_is_no_python(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [shutil.which("bash"), ROOT / "scripts" / "install.sh"],
        env={"PATH": str(tools), "VLLM_REDRAFTER_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "sudo apt install python3 python3-venv" in done.stderr
