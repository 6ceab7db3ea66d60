# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: links that leave docs/.

On the site a section of the README is the page that holds it; other files are linked where
``repo_url`` of mkdocs.yml says where the repository is, and else only named. That the files are
there is checked by tests/unit/test_docs.py.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

# Sections of the README that are pages of their own here.
PAGES = {"limits": "limits.md", "what-is-exact": "exact.md", "options": "options.md"}
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls this with the text of every page."""
    return LINK.sub(lambda link: inside(link, config.get("repo_url")), markdown)


def inside(link: re.Match[str], repository: str | None) -> str:
    """What stands for a link to a file outside docs/."""
    words, path, anchor = link[1], posixpath.normpath(link[2]).removeprefix("../"), link[3] or ""
    if path == "README.md" and anchor[1:] in PAGES:
        return f"[{words}]({PAGES[anchor[1:]]})"
    if repository:
        return f"[{words}]({repository.rstrip('/')}/blob/main/{path}{anchor})"
    return words if path in words or "`" in words else f"{words} (`{path}`)"
