# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "README.md")
DOCUMENTS = sorted(path.relative_to(ROOT) for path in PATHS)


def missing(document: Path, text: str) -> list[str]:
    """Files that are linked, and tests that are named, and are not there."""
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    here = (ROOT / document).parent
    linked = [link for link in links if "://" not in link and not (here / link).exists()]
    named = re.findall(r"`((?:[a-z_0-9]+/)+(?:[a-z_0-9]+\.py)?)`", text) if here != ROOT else []
    there = [any((top / name).exists() for top in (ROOT, ROOT / "tests")) for name in named]
    return linked + [name for name, is_there in zip(named, there, strict=True) if not is_there]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_what_is_named_is_there(document):
    assert missing(document, (ROOT / document).read_text()) == []


def test_what_is_not_there_is_seen():
    text = "[a](nothing.md#there) [b](../README.md#here) `unit/test_nothing.py` `unit/test_docs.py`"
    assert missing(Path("docs/failures.md"), text) == ["nothing.md", "unit/test_nothing.py"]


@pytest.mark.parametrize("name", ["messages", "support", "benchmarks"])
def test_generated_pages_are_what_their_scripts_make(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))
    # Scripts put folders on the path themselves: what they added goes again.
    monkeypatch.setattr("sys.path", list(sys.path))
    for module in (name, "settings"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert importlib.import_module(name).page() == (ROOT / "docs" / f"{name}.md").read_text()


def test_a_new_message_without_a_cure_is_seen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))
    monkeypatch.delitem(sys.modules, "messages", raising=False)
    messages = importlib.import_module("messages")
    source = 'raise DrafterError(f"{name} is odd.")'
    [found] = messages.messages_in(source, "drafter/x.py")
    assert found.text == "... is odd." and messages.cure_of(found.text, {}) is None
    monkeypatch.setattr(messages, "all_messages", lambda: [found])
    with pytest.raises(SystemExit, match="is odd"):
        messages.page()
