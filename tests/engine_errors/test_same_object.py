# SPDX-License-Identifier: Apache-2.0
"""An ``EngineArgs`` that was refused, or that served, says afterwards what the user said."""

import copy

import pytest
from engine_errors.test_not_asked_for import as_plain

from vllm_redrafter.engine import engine_args as module
from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.options import OptionError
from vllm_redrafter.plugin import register

# Refused before vLLM's own code runs, and behind it.
REFUSED = [
    ({"beam_widht": 3}, {}, OptionError),
    ({"beam_width": 0}, {}, OptionError),
    ({}, {"pipeline_parallel_size": 2}, UnsupportedError),
    ({}, {"kv_cache_dtype": "fp8"}, UnsupportedError),
    ({"num_speculative_tokens": 15}, {"max_num_batched_tokens": 8, "max_num_seqs": 4}, OptionError),
]


def fields_of(args):
    """What an object says, but for a part in which vLLM's validation fills in a path."""
    return {name: value for name, value in vars(args).items() if name != "profiler_config"}


@pytest.fixture
def make(target, drafter):
    """EngineArgs with ReDrafter asked for, and a copy of all that the user said."""
    from vllm.engine.arg_utils import EngineArgs

    register()

    def build(options=None, **fields):
        speculative = {"method": "redrafter", "model": str(drafter), **(options or {})}
        args = EngineArgs(model=str(target), speculative_config=speculative, **fields)
        return args, copy.deepcopy(fields_of(args))

    return build


@pytest.mark.parametrize("options, fields, error", REFUSED)
def test_a_refusal_changes_nothing(make, options, fields, error):
    args, said = make(options, **fields)
    with pytest.raises(error):
        args.create_engine_config()
    assert fields_of(args) == said


def test_after_a_refusal_the_object_serves_plain_vllm(make, target):
    from vllm.engine.arg_utils import EngineArgs

    args, _ = make(kv_cache_dtype="fp8")
    with pytest.raises(UnsupportedError):
        args.create_engine_config()
    args.speculative_config = None
    plain = EngineArgs(model=str(target), kv_cache_dtype="fp8")
    config = args.create_engine_config()
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert as_plain(config) == as_plain(plain.create_engine_config())


def test_the_same_object_again(make):
    """As ``vllm serve`` with several API servers may do; the second config is the first one."""
    args, said = make({"num_speculative_tokens": 5}, additional_config={"mine": 1})
    first = args.create_engine_config()
    for name in ("speculative_config", "worker_cls", "additional_config"):
        assert getattr(args, name) == said[name]
    assert as_plain(args.create_engine_config()) == as_plain(first)
    assert first.additional_config["redrafter"]["num_speculative_tokens"] == 5


def test_what_vllm_sets_itself_is_there_as_without_us(make, target):
    from vllm.engine.arg_utils import EngineArgs

    args, said = make()
    plain = EngineArgs(model=str(target))
    for one in (args, plain):
        one.create_engine_config()
    assert said["max_num_seqs"] is None
    assert args.max_num_seqs == plain.max_num_seqs is not None
    assert args.max_num_batched_tokens == plain.max_num_batched_tokens is not None


def test_rewriting_for_graphs_leaves_the_users_compilation_config(make, monkeypatch):
    args, said = make()
    ours = copy.copy(args)
    options, _ = module.read_options(dict(args.speculative_config))
    monkeypatch.setattr("vllm_redrafter.ops.library.has_kernel", lambda device: False)
    module._choose_graphs(ours, options)
    assert ours.compilation_config.cudagraph_mode is not None
    assert args.compilation_config.cudagraph_mode is said["compilation_config"].cudagraph_mode


def test_the_comparison_sees_a_rewritten_object(make):
    args, said = make()
    options, _ = module.read_options(dict(args.speculative_config))
    module.rewrite(args, options)
    assert fields_of(args) != said
