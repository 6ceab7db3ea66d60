# SPDX-License-Identifier: Apache-2.0
"""Which part of the package may import which, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_redrafter

PACKAGE = Path(vllm_redrafter.__file__).parent
NAME = "vllm_redrafter"
ENGINE_FREE = ("drafter", "tree", "ops")


def imported_modules(source: str, module: str) -> set[str]:
    """Full names of all modules that ``source``, itself ``module``, imports anywhere in it.

    ``from a import b`` counts as ``a`` and ``a.b``, because b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def files_under(*parts: str) -> list[Path]:
    return sorted(PACKAGE.joinpath(*parts).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    module = ".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts])
    return imported_modules(path.read_text(encoding="utf-8"), module)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_scan_sees_every_form_of_import():
    source = (
        "import vllm.v1\n"
        "def f():\n"
        "    from vllm import LLM\n"
        "    from ..engine.v1 import runner\n"
        "    import importlib; importlib.import_module('vllm.sampling_params')\n"
    )
    found = imported_modules(source, f"{NAME}.ops.thing")
    assert {"vllm.v1", "vllm", "vllm.LLM", "vllm.sampling_params"} <= found
    assert f"{NAME}.engine.v1.runner" in found


@pytest.mark.parametrize("part", ENGINE_FREE)
def test_the_mathematics_imports_no_engine(part):
    paths = files_under(part)
    assert paths
    for path in paths:
        bad = {
            module
            for module in imports_of(path)
            if within(module, "vllm") or within(module, f"{NAME}.engine")
        }
        assert not bad, f"{path.relative_to(PACKAGE)} imports {sorted(bad)}"


def test_the_mathematics_runs_in_a_python_without_vllm():
    """By running it: a finder that refuses vLLM stands in for an environment that lacks it."""
    modules = [
        ".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts])
        for part in ENGINE_FREE
        for path in files_under(part)
    ]
    code = (
        "import importlib, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'vllm':\n"
        "            raise ImportError(f'{name} is refused here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ours, other", [("v1", "v2"), ("v2", "v1")])
def test_the_engines_do_not_import_each_other(ours, other):
    for path in files_under("engine", ours):
        bad = {m for m in imports_of(path) if within(m, f"{NAME}.engine.{other}")}
        assert not bad, f"{path.relative_to(PACKAGE)} imports {sorted(bad)}"


def test_there_is_a_first_engine_to_check():
    assert files_under("engine", "v1")


def test_what_both_engines_share_imports_neither():
    for path in sorted((PACKAGE / "engine").glob("*.py")):
        bad = {
            m
            for m in imports_of(path)
            if within(m, f"{NAME}.engine.v1") or within(m, f"{NAME}.engine.v2")
        }
        assert not bad, f"{path.name} imports {sorted(bad)}"
