# SPDX-License-Identifier: Apache-2.0
"""Loaded with ``-p`` in the process that runs Model Runner V2; never in the others."""

from __future__ import annotations

import pytest
from engine_v1.tiny_target import tiny_drafter, write_target, write_taught_drafter
from redrafter_test_triton_cpu.vllm_plugin import apply

from engine_v2.own_process.engines import DRAFTER_ALONE, HYBRID, SPEC, Pair, engine
from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.plugin import register

apply()
register()


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def drafter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "drafter"
    save_drafter(tiny_drafter(), directory)
    return directory


@pytest.fixture(scope="session")
def make_pair(target, drafter):
    def make(**settings):
        spec = SPEC | {k: v for k, v in settings.items() if k.startswith("spec_")}
        common = {k: v for k, v in settings.items() if not k.startswith("spec_")}
        return Pair(engine(target, **common), engine(target, drafter, **common, **spec))

    return make


@pytest.fixture(scope="session")
def pair(make_pair):
    return make_pair()


@pytest.fixture(scope="session")
def taught_drafter(pair, target, tmp_path_factory):
    """A drafter that has seen the answers to ``prompts(8)``."""
    from engine_v1.engines import tokens
    from engine_v1.tiny_target import prompts
    from vllm import SamplingParams

    batch = prompts(8)
    pair.plain.reset()
    said = tokens(pair.plain.generate(batch, SamplingParams(temperature=0, max_tokens=40)))
    texts = [prompt + answer for prompt, answer in zip(batch, said, strict=True)]
    return write_taught_drafter(tmp_path_factory.mktemp("models") / "taught", target, texts)


@pytest.fixture(scope="session")
def taught(target, taught_drafter):
    """The drafter alone: no oracle drafts unless a test puts one there."""
    return engine(target, taught_drafter, **DRAFTER_ALONE)


@pytest.fixture(scope="session")
def hybrid(target, taught_drafter):
    """The drafter and the lookup."""
    return engine(target, taught_drafter, **HYBRID)
