# SPDX-License-Identifier: Apache-2.0
"""A tiny target and a drafter that is often right about it, so that trees are really accepted."""

import pytest
import tiny_models


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return tiny_models.write_llama(
        tmp_path_factory.mktemp("soak-target") / "tiny-llama", context_weight=0.8
    )


@pytest.fixture(scope="session")
def drafter(tmp_path_factory, target):
    return tiny_models.write_fitted_drafter(
        tmp_path_factory.mktemp("soak-drafter") / "fitted-drafter", target
    )
