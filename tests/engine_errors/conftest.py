# SPDX-License-Identifier: Apache-2.0
"""The real way in: EngineArgs with the plugin registered, on a tiny target without an engine."""

import pytest
import tiny_models


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return tiny_models.write_llama(tmp_path_factory.mktemp("target") / "tiny-llama")


@pytest.fixture(scope="session")
def drafter(tmp_path_factory):
    """A random drafter that fits ``target``; read only."""
    return tiny_models.write_random_drafter(tmp_path_factory.mktemp("drafter") / "tiny-drafter")


@pytest.fixture
def own_drafter(tmp_path):
    """The same in a directory that the test may spoil."""
    return tiny_models.write_random_drafter(tmp_path / "spoilt-drafter")


@pytest.fixture
def engine_config(target, drafter):
    """Build a VllmConfig as ``LLM`` and ``vllm serve`` do, with ReDrafter asked for."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_redrafter.plugin import register

    register()

    def build(model=target, drafter_dir=drafter, options=None, **engine_args):
        speculative = {"method": "redrafter", "model": str(drafter_dir), **(options or {})}
        args = EngineArgs(model=str(model), speculative_config=speculative, **engine_args)
        return args.create_engine_config()

    return build
