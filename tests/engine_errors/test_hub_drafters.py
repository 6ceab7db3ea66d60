# SPDX-License-Identifier: Apache-2.0
"""Drafters by their names on the hub, offline: what lies in the cache is found, by revision."""

import shutil

import pytest
import tiny_models

from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.options import OptionError

NAME = "someone/some-drafter"
# The commits of two revisions, as the hub names them.
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(drafter, tmp_path, monkeypatch):
    """A cache as huggingface_hub keeps it: snapshots by commit, branches and tags as refs."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--someone--some-drafter"
    for commit, seed in ((MAIN, 0), (OLD, 1)):
        tiny_models.write_random_drafter(folder / "snapshots" / commit, seed=seed)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(MAIN)
    (folder / "refs" / "v0.1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    return folder


def test_the_newest_without_a_revision(engine_config, cache):
    config = engine_config(drafter_dir=NAME)
    assert config.additional_config["redrafter"]["model"] == str(cache / "snapshots" / MAIN)


@pytest.mark.parametrize("revision, commit", [("main", MAIN), ("v0.1", OLD), (OLD, OLD)])
def test_a_branch_a_tag_and_a_commit(engine_config, cache, revision, commit):
    config = engine_config(drafter_dir=NAME, options={"revision": revision})
    assert config.additional_config["redrafter"]["model"] == str(cache / "snapshots" / commit)
    assert "revision" not in config.additional_config["redrafter"]


def test_a_revision_that_is_not_there(engine_config, cache):
    with pytest.raises(DrafterError, match=f"'{NAME}' at revision 'v9' is no local directory"):
        engine_config(drafter_dir=NAME, options={"revision": "v9"})


@pytest.mark.parametrize("revision", [1, "", ["main"]])
def test_a_revision_that_is_none(engine_config, cache, revision):
    with pytest.raises(OptionError, match="it must be a branch, a tag or a commit"):
        engine_config(drafter_dir=NAME, options={"revision": revision})


def test_of_a_directory_it_is_ignored(engine_config, drafter, tmp_path):
    """As vLLM ignores that of a target."""
    shutil.copytree(drafter, tmp_path / "copy")
    config = engine_config(drafter_dir=tmp_path / "copy", options={"revision": "v0.1"})
    assert config.additional_config["redrafter"]["model"] == str(tmp_path / "copy")
