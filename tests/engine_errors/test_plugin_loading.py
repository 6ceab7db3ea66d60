# SPDX-License-Identifier: Apache-2.0
"""However often, where and beside whom the plugin is loaded, the method works once."""

import functools
import multiprocessing
import subprocess
import sys

import pytest

from vllm_redrafter.engine import engine_args as module
from vllm_redrafter.plugin import register

GROUP = "vllm.general_plugins"


@pytest.fixture
def arg_utils(monkeypatch):
    """``EngineArgs`` as vLLM has it, whatever was registered before; put back afterwards."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    stock = EngineArgs.create_engine_config
    while hasattr(stock, "__wrapped__"):
        stock = stock.__wrapped__
    monkeypatch.setattr(EngineArgs, "create_engine_config", stock)
    return EngineArgs


@pytest.fixture
def fresh_environment():
    """vLLM reads the environment again; it stops doing so when an engine runs in this process."""
    from vllm import envs

    kept = hasattr(envs.__getattr__, "cache_clear")
    envs.disable_envs_cache()
    yield
    if kept:
        envs.enable_envs_cache()


def another_plugin(arg_utils, calls, careful=True):
    """Wraps the same function; ``careful`` is with functools.wraps."""
    original = arg_utils.create_engine_config

    def wrapped(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    arg_utils.create_engine_config = (
        functools.wraps(original)(wrapped) if careful else wrapped
    )


def serves(arg_utils, target, drafter):
    """Whether a config asked for by method is ours, and one without is vLLM's."""
    asked = {"method": "redrafter", "model": str(drafter), "num_speculative_tokens": 4}
    ours = arg_utils(model=str(target), speculative_config=asked).create_engine_config()
    assert ours.additional_config["redrafter"]["num_speculative_tokens"] == 4
    assert ours.parallel_config.worker_cls == module.CPU_WORKER_PATH
    plain = arg_utils(model=str(target)).create_engine_config()
    assert plain.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "redrafter" not in plain.additional_config
    return True


@pytest.mark.parametrize("careful", [True, False])
@pytest.mark.parametrize("order", ["before", "behind", "between two loads"])
def test_beside_another_plugin(arg_utils, target, drafter, monkeypatch, order, careful):
    checked = []
    monkeypatch.setattr(
        "vllm_redrafter.engine.checks.check_files", lambda *_: checked.append("once")
    )
    calls = []
    if order != "before":
        register()
    another_plugin(arg_utils, calls, careful)
    if order != "behind":
        register()
    assert serves(arg_utils, target, drafter)
    assert len(calls) == 2, "once for each config"
    assert checked == ["once"], "of the two configs one is ours"


def test_loaded_again_behind_a_careful_one(arg_utils):
    register()
    another_plugin(arg_utils, [])
    outermost = arg_utils.create_engine_config
    register()
    assert arg_utils.create_engine_config is outermost


@pytest.mark.parametrize(
    "allowed, found",
    [(None, True), ("redrafter", True), ("other,redrafter", True), ("other", False), ("", False)],
)
def test_the_filter_of_vllm(
    fresh_environment, arg_utils, target, drafter, monkeypatch, allowed, found
):
    from vllm.plugins import load_plugins_by_group

    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    plugins = load_plugins_by_group(GROUP)
    assert ("redrafter" in plugins) == found
    for load in plugins.values():
        load()
    if found:
        assert serves(arg_utils, target, drafter)
    else:
        with pytest.raises(Exception, match="method"):
            serves(arg_utils, target, drafter)


def in_a_child(queue, target, drafter):
    """Loads as a worker does, twice."""
    from vllm import plugins
    from vllm.engine.arg_utils import EngineArgs

    for _ in range(2):
        # A forked child has this from its parent.
        plugins.plugins_loaded = False
        plugins.load_general_plugins()
    wrappers, function = 0, EngineArgs.create_engine_config
    while function is not None:
        wrappers += getattr(function, "__module__", "") == module.__name__ or hasattr(
            function, "__wrapped__"
        )
        function = getattr(function, "__wrapped__", None)
    queue.put((wrappers, serves(EngineArgs, target, drafter)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_in_workers(target, drafter, monkeypatch, method):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    register()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(queue, str(target), str(drafter)))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    assert found == (1, True) and child.exitcode == 0


@pytest.mark.slow
def test_loaded_before_vllm_is_imported(target, drafter):
    """The other order is that of all other tests."""
    code = (
        "import sys\n"
        "from vllm_redrafter.plugin import register\n"
        "assert 'vllm' not in sys.modules\n"
        "register()\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "asked = {'method': 'redrafter', 'model': sys.argv[2]}\n"
        "made = EngineArgs(model=sys.argv[1], speculative_config=asked).create_engine_config()\n"
        "assert 'redrafter' in made.additional_config\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), str(drafter)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
