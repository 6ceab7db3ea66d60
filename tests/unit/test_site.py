# SPDX-License-Identifier: Apache-2.0
"""The docs site builds with warnings as errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("mkdocs.yml", "README.md", "docs", "examples", "scripts/docs")

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path):
    """What the site is made of, to be changed."""
    for part in PARTS:
        source, copy = ROOT / part, tmp_path / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    return tmp_path


def build(checkout):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=checkout, timeout=120,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_site_builds(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    site = checkout / "build" / "site"
    pages = {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.name for page in site.glob("*.html")}
    how = (site / "how-it-works.html").read_text(encoding="utf-8")
    assert "keep_accepted" in how and "--8<--" not in how
    assert (site / "pictures" / "step.svg").is_file()
    # Nothing is loaded from elsewhere.
    assert 'src="http' not in how and "fonts.googleapis" not in how


@pytest.mark.parametrize(
    "fault, named",
    [
        ("[a](nothing.md) and [b](install.md#nowhere)", ["nothing.md", "#nowhere"]),
        ('--8<-- "examples/nothing.py"', ["nothing.py"]),
    ],
)
def test_a_broken_page_does_not_build(checkout, fault, named):
    with (checkout / "docs" / "limits.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{fault}\n")
    done = build(checkout)
    assert done.returncode != 0
    assert [name for name in named if name not in done.stderr + done.stdout] == []
