# SPDX-License-Identifier: Apache-2.0
"""Code, commands, options and pictures of the documents are those of the program."""

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import vllm_redrafter
from vllm_redrafter import cli
from vllm_redrafter.options import VALID_KEYS

ROOT = Path(__file__).resolve().parents[2]
# Made from the source's messages and from tests' tables: other programs' options stand in them.
GENERATED = {"messages.md", "support.md", "benchmarks.md"}
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "README.md")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(PAGES)
    if path.name not in GENERATED
}
# Of pip, pytest, torchrun, mkdocs, git and vLLM's server, as far as the documents use them.
OTHERS = {
    "--no-build-isolation", "--durations", "--nproc-per-node", "--strict", "--served-model-name",
    "--spec-method", "--spec-model", "--disable-log-stats", "--memory-limit",
}  # fmt: skip
[VLLM] = importlib.util.find_spec("vllm").submodule_search_locations  # found, not imported
VLLMS = (Path(VLLM) / "engine" / "arg_utils.py").read_text(encoding="utf-8")


def sources():
    """Text of everything of ours that declares options."""
    files = (*ROOT.glob("vllm_redrafter/**/*.py"), *ROOT.glob("benchmarks/**/*.py"),
             *ROOT.glob("tests/sweep/*.py"), *ROOT.glob("tests/soak/*.py"),
             *ROOT.glob("scripts/**/*.py"), *ROOT.glob("examples/*.py"))  # fmt: skip
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def known_options():
    """Every ``--option`` that is declared, by us or by vLLM's engine."""
    ours = sources()
    declared = {*re.findall(r'"(--[a-z0-9-]+)"', ours + VLLMS)}
    # Options made from the fields of dataclasses: a field `of_it` is `--of-it`, or `--no-of-it`.
    fields = {name.replace("_", "-") for name in re.findall(r"^    ([a-z_0-9]+):", ours, re.M)}
    fields |= {name.replace("_", "-") for name in re.findall(r'"([a-z_]+)": [a-z]', ours)}
    declared |= {f"--{name}" for name in fields}
    return declared | {f"--no-{name[2:]}" for name in declared} | OTHERS


def unknown_options(text, known):
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - known)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_are_declared_somewhere(name):
    assert unknown_options(DOCUMENTS[name], known_options()) == []


def test_an_option_that_is_not_there_is_seen():
    text = "`--beam-width 3 --enforce-eager --no-prompt-lookup --beem-width`"
    assert unknown_options(text, known_options()) == ["--beem-width"]


def fenced(text, language):
    """Blocks of a language, but those that are included from files."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [block for block in blocks if "--8<--" not in block]


def indented(text):
    """Indented blocks that begin a paragraph: commands."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    paragraphs = re.split(r"\n\s*\n", plain)
    return [textwrap.dedent(p) for p in paragraphs if p.startswith("    ") and "* " not in p[:8]]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_compile_and_use_what_there_is(name):
    for block in fenced(DOCUMENTS[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm_redrafter"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_shell(name):
    blocks = indented(DOCUMENTS[name]) + fenced(DOCUMENTS[name], "(?:bash|sh)")
    done = subprocess.run(
        ["bash", "-n"], input="\n".join(blocks).replace("[FLAG...]", ""), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_commands_and_their_files_are_there():
    commands, files = set(), set()
    for text in DOCUMENTS.values():
        commands |= set(re.findall(r"vllm-redrafter ([a-z]+)(?=[ `])", text))
        for block in indented(text):
            files |= set(re.findall(r"(?<![\w/])(?:scripts|examples)/[\w./]+\.\w+", block))
    words = {"speculative", "is", "on"}
    assert commands - words <= set(cli.COMMANDS) and "show" in commands
    assert len(files) > 6 and [file for file in files if not (ROOT / file).is_file()] == []


def test_json_of_the_flag_has_known_keys():
    found = 0
    for text in DOCUMENTS.values():
        for block in indented(text):
            for word in shlex.split(block.replace("...", ""), comments=True):
                if word.startswith("{"):
                    found += 1
                    assert set(ast.literal_eval(word)) <= set(VALID_KEYS)
    assert found > 3


def test_the_table_of_options_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|", DOCUMENTS["docs/options.md"], re.M)
    assert sorted(rows) == sorted(VALID_KEYS)


def test_every_environment_variable_is_read_somewhere():
    text = "\n".join(DOCUMENTS.values())
    scripts = "\n".join(
        file.read_text(encoding="utf-8")
        for file in (ROOT / "setup.py", *ROOT.glob("scripts/*.sh"), *ROOT.glob("csrc/**/*.cpp"),
                     *ROOT.glob("tests/**/*.py"))
    )  # fmt: skip
    named = set(re.findall(r"VLLM_REDRAFTER_[A-Z_]+", text))
    assert len(named) > 4
    assert [name for name in named if name not in sources() + scripts] == []


@pytest.fixture
def docs_script(monkeypatch):
    """A fresh module of scripts/docs."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_pictures_are_what_their_scripts_make(docs_script):
    pictures = ROOT / "docs" / "pictures"
    step, architecture = docs_script("step_picture"), docs_script("architecture")
    assert step.page() == (pictures / "step.svg").read_text(encoding="utf-8")
    assert step.terminal() == (pictures / "show.svg").read_text(encoding="utf-8")
    assert architecture.page() == (pictures / "architecture.svg").read_text(encoding="utf-8")


def test_the_architecture_page_names_every_room(docs_script):
    rooms = set(docs_script("architecture").arrows())
    table = set(re.findall(r"^\| `([\w/]+)` \|", DOCUMENTS["docs/architecture.md"], re.M))
    assert table == rooms


def test_rooms_do_not_import_upwards(docs_script):
    """The rules that the page states; `rows` itself refuses a circle."""
    architecture = docs_script("architecture")
    imports = architecture.arrows()
    architecture.rows(imports)
    pure = {"drafter", "lookup", "tree", "budget"}
    assert all(imports[room] <= pure for room in pure)
    assert "engine/v2" not in imports["engine/v1"] and "engine/v1" not in imports["engine/v2"]
    with pytest.raises(ValueError, match="cycle"):
        architecture.rows({"a": {"b"}, "b": {"a"}})


def test_the_public_names_are_in_the_page_of_parts():
    text = DOCUMENTS["docs/parts.md"]
    assert [name for name in vllm_redrafter.__all__ if name not in text] == []


@pytest.mark.parametrize(
    "link, repository, there",
    [
        ("[csrc/README.md](../csrc/README.md)", None, "csrc/README.md"),
        ("[the card](../a/README.md)", None, "the card (`a/README.md`)"),
        ("[limits](../README.md#limits)", None, "[limits](limits.md)"),
        ("[x](../a.md#b)", "https://host/r/", "[x](https://host/r/blob/main/a.md#b)"),
        ("[limits](limits.md)", None, "[limits](limits.md)"),
    ],
)
def test_links_that_leave_the_site(docs_script, link, repository, there):
    hooks = docs_script("hooks")
    config = {"repo_url": repository}
    assert hooks.on_page_markdown(f"a {link} b", None, config, None) == f"a {there} b"
