# SPDX-License-Identifier: Apache-2.0
"""One tiny target and one dataset of its greedy text, for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import greedy_rollouts
from training_cases import write_chat_target, write_dataset


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_target(tmp_path_factory.mktemp("training") / "target")


@pytest.fixture(scope="session")
def data(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts, _ = greedy_rollouts(target, rows=256, length=48)
    return write_dataset(tmp_path_factory.mktemp("training") / "data", texts)
