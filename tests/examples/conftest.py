# SPDX-License-Identifier: Apache-2.0
"""A tiny target, a drafter that is often right about it, and the examples as modules."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny_models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return tiny_models.write_llama(
        tmp_path_factory.mktemp("examples-target") / "tiny-llama", context_weight=0.8
    )


@pytest.fixture(scope="session")
def drafter(tmp_path_factory, target):
    return tiny_models.write_fitted_drafter(
        tmp_path_factory.mktemp("examples-drafter") / "fitted-drafter", target, steps=250
    )


@pytest.fixture
def example():
    """``example("generate")`` is a fresh module of examples/generate.py."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def chat_target(target):
    """The same target as examples expect one: room for 2,048 tokens, and a chat template."""
    for name, fields in (
        ("config.json", {"max_position_embeddings": 2048}),
        ("tokenizer_config.json", {"chat_template": CHAT_TEMPLATE}),
    ):
        file = target / name
        tiny_models.write_json(file, {**json.loads(file.read_text()), **fields})
    return target
