# SPDX-License-Identifier: Apache-2.0
"""The tiny target, its drafter, and the pair of engines that most tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from engine_v1.engines import Pair, engine, tokens
from engine_v1.tiny_target import (
    prompts,
    tiny_drafter,
    write_target,
    write_taught_drafter,
)
from vllm_redrafter.drafter.checkpoint import save_drafter

# Wide enough that a tree of 15 nodes is allowed; the oracle decides what is in it.
SPEC = {"spec_num_speculative_tokens": 15, "spec_beam_width": 4, "spec_draft_length": 4}


@pytest.fixture(scope="session", autouse=True)
def _plugin() -> None:
    from vllm_redrafter.plugin import register

    register()


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "drafter"
    save_drafter(tiny_drafter(), directory)
    return directory


@pytest.fixture(scope="session")
def make_pair(target: Path, drafter: Path) -> Callable[..., Pair]:
    """Engines with other settings than the usual; ``spec_*`` are ReDrafter's."""

    def make(**settings: Any) -> Pair:
        spec = SPEC | {k: v for k, v in settings.items() if k.startswith("spec_")}
        common = {k: v for k, v in settings.items() if not k.startswith("spec_")}
        return Pair(engine(target, **common), engine(target, drafter, **common, **spec))

    return make


@pytest.fixture(scope="session")
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture(scope="session")
def taught_drafter(pair: Pair, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that has seen the answers to ``prompts(16)``."""
    batch = prompts(16)
    said = tokens(pair.plain.generate(batch, SamplingParams(temperature=0, max_tokens=60)))
    texts = [prompt + answer for prompt, answer in zip(batch, said, strict=True)]
    return write_taught_drafter(tmp_path_factory.mktemp("models") / "taught", target, texts)
