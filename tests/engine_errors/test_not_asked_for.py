# SPDX-License-Identifier: Apache-2.0
"""A vLLM user who does not ask for ReDrafter sees no change, and no plugin failure either."""

import dataclasses
import logging
import subprocess
import sys

import pytest

from vllm_redrafter.engine import engine_args
from vllm_redrafter.plugin import register

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@pytest.fixture
def stock():
    """EngineArgs.create_engine_config without the plugin, whatever ran before."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    return EngineArgs.create_engine_config.__wrapped__


def as_plain(value):
    """Nested plain values of a config, ids and addresses of this very object left out."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: as_plain(getattr(value, field.name, None))
            for field in dataclasses.fields(value)
            if field.name != "instance_id"
        }
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return as_plain(value.to_dict())
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


@pytest.mark.parametrize("speculative", [None, NGRAM], ids=["no speculation", "ngram"])
def test_config_is_identical_with_and_without_the_plugin(stock, target, speculative):
    from vllm.engine.arg_utils import EngineArgs

    def args():
        return EngineArgs(
            model=str(target), speculative_config=speculative and dict(speculative), max_num_seqs=4
        )

    with_plugin = as_plain(args().create_engine_config())
    without = as_plain(stock(args()))
    assert with_plugin == without
    assert with_plugin["parallel_config"]["worker_cls"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "redrafter" not in with_plugin["additional_config"]


def test_the_comparison_sees_a_rewritten_config(stock, target, drafter):
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "redrafter", "model": str(drafter)}
    ours = EngineArgs(model=str(target), speculative_config=speculative).create_engine_config()
    assert as_plain(ours) != as_plain(stock(EngineArgs(model=str(target))))


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "no_such_method", "num_speculative_tokens": 2},
        {"method": "ngram"},
        {"model": "/no/such/directory", "num_speculative_tokens": 2},
    ],
)
def test_errors_of_other_methods_stay_vllms_own(stock, target, bad):
    from vllm.engine.arg_utils import EngineArgs

    def error(build):
        with pytest.raises(Exception) as raised:
            build(EngineArgs(model=str(target), speculative_config=dict(bad)))
        return type(raised.value), str(raised.value).partition("[type=")[0]

    assert error(lambda args: args.create_engine_config()) == error(stock)


def test_a_directory_of_ours_is_recognised_without_a_method(target, drafter):
    from vllm.engine.arg_utils import EngineArgs

    register()
    config = EngineArgs(
        model=str(target), speculative_config={"model": str(drafter)}
    ).create_engine_config()
    assert config.additional_config["redrafter"]["model"] == str(drafter)


def test_engine_args_fields_instead_of_the_json_object(target, drafter):
    from vllm.engine.arg_utils import EngineArgs

    register()
    config = EngineArgs(
        model=str(target), spec_method="redrafter", spec_model=str(drafter), spec_tokens=5
    ).create_engine_config()
    assert config.speculative_config.num_speculative_tokens == 5


def test_additional_config_of_the_user_is_kept(target, drafter):
    from vllm.engine.arg_utils import EngineArgs

    register()
    mine = {"other_plugin": {"x": 1}}
    config = EngineArgs(
        model=str(target),
        additional_config=mine,
        speculative_config={"method": "redrafter", "model": str(drafter)},
    ).create_engine_config()
    assert config.additional_config["other_plugin"] == {"x": 1}
    assert mine == {"other_plugin": {"x": 1}}


def test_registering_again_wraps_only_once():
    from vllm.engine.arg_utils import EngineArgs

    register()
    once = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is once
    assert not hasattr(once.__wrapped__, "__wrapped__")


def test_registering_never_raises(monkeypatch, caplog):
    def broken():
        raise RuntimeError("vLLM moved everything")

    monkeypatch.setattr(engine_args, "install", broken)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("ERROR", logger="vllm"):
        assert register() is None
    assert "vllm-redrafter could not register itself" in caplog.text
    assert "vllm-redrafter doctor" in caplog.text


def test_the_entry_point_is_cheap():
    """Every vLLM process runs it: it must not pull in torch or vLLM by being imported."""
    code = (
        "import sys, vllm_redrafter.plugin\n"
        "heavy = {'torch', 'vllm', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
