# SPDX-License-Identifier: Apache-2.0
"""The engine is prepared for the model runner that vLLM will choose."""

import logging
from types import SimpleNamespace

import pytest

from vllm_redrafter.engine import checks, compat, engine_args
from vllm_redrafter.engine.checks import UnsupportedError, check_engine_args
from vllm_redrafter.engine.engine_args import OPTIONS_KEY, V2_CPU_WORKER_PATH
from vllm_redrafter.options import ReDrafterOptions


@pytest.fixture
def triton(monkeypatch):
    """As if Triton could run here: vLLM's own condition for Model Runner V2."""
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)


def test_v1_on_a_cpu_without_triton(engine_config):
    config = engine_config()
    assert not config.use_v2_model_runner
    assert config.speculative_config.method == "custom_class"
    assert config.parallel_config.worker_cls.startswith("vllm_redrafter.engine.v1.")


def test_v2_where_vllm_would_run_it(engine_config, triton, drafter):
    config = engine_config()
    assert config.use_v2_model_runner
    assert config.parallel_config.worker_cls == V2_CPU_WORKER_PATH
    spec = config.speculative_config
    assert (spec.method, spec.model) == ("draft_model", str(drafter))
    options = config.additional_config[OPTIONS_KEY]
    assert spec.num_speculative_tokens == options["num_speculative_tokens"]
    assert spec.draft_sample_method == "greedy"


def test_tensor_parallel_on_v2(engine_config, triton):
    """The drafter is whole on every rank; vLLM must not want to divide its description."""
    config = engine_config(tensor_parallel_size=2)
    assert config.use_v2_model_runner
    assert config.speculative_config.draft_parallel_config.tensor_parallel_size == 1


def test_a_schedule_by_batch_size_is_handed_to_vllm(engine_config, triton):
    schedule = [[1, 2, 9], [3, 8, 2]]
    config = engine_config(options={"num_speculative_tokens_per_batch_size": schedule})
    spec = config.speculative_config
    given = [tuple(row) for row in spec.num_speculative_tokens_per_batch_size]
    assert given == [(1, 2, min(9, spec.num_speculative_tokens)), (3, 8, 2)]


def test_lora_is_allowed_on_v2(engine_config, triton):
    assert engine_config(enable_lora=True).lora_config is not None


def test_lora_is_allowed_on_v1(engine_config):
    assert engine_config(enable_lora=True).lora_config is not None


def test_forced_v1(engine_config, triton, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert engine_config().speculative_config.method == "custom_class"


@pytest.fixture
def cuda(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)


# What the check reads of EngineArgs.
ARGS = SimpleNamespace(
    worker_cls="auto",
    pipeline_parallel_size=1,
    decode_context_parallel_size=1,
    prefill_context_parallel_size=1,
    enable_expert_parallel=False,
    data_parallel_size=1,
    enable_batch_sharded_sampling=None,
    async_scheduling=None,
    kv_cache_dtype="auto",
    kv_offloading_size=None,
    kv_sharing_fast_prefill=False,
    aux_output_config=SimpleNamespace(enable_return_routed_experts=False),
)


def test_cuda_says_that_it_has_not_run_on_a_gpu(cuda, triton, caplog):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("WARNING", logger="vllm"):
        assert check_engine_args(ARGS) is True
    # A set: vLLM's handlers may hand a record on twice.
    assert len({r.message for r in caplog.records if "not been run on a GPU" in r.message}) == 1


OPTIONS = ReDrafterOptions(model="m", num_speculative_tokens=32)


@pytest.fixture
def rewritten(cuda, triton):
    """EngineArgs, as far as they matter, after the rewriting for a GPU."""
    from vllm.config import CompilationConfig

    def rewrite(eager=False, sizes=None, **compilation):
        made = SimpleNamespace(
            additional_config=None,
            compilation_config=CompilationConfig(**compilation),
            enforce_eager=eager,
            cudagraph_capture_sizes=sizes,
            max_cudagraph_capture_size=None,
            max_num_seqs=None,
            max_num_batched_tokens=None,
        )
        engine_args.rewrite(made, OPTIONS, v2=True)
        return made

    return rewrite


@pytest.fixture
def kernels(monkeypatch):
    """As if the library had CUDA kernels, or none."""

    def there(yes):
        monkeypatch.setattr("vllm_redrafter.ops.library.has_kernel", lambda device: yes)
        monkeypatch.setattr(checks, "has_kernel", lambda device: yes)

    return there


def check(made):
    checks._check_v2(
        SimpleNamespace(
            parallel_config=SimpleNamespace(use_ubatching=False),
            device_config=SimpleNamespace(device_type="cuda"),
            compilation_config=made.compilation_config,
        ),
        OPTIONS,
    )


def test_cuda_gets_the_gpu_worker(rewritten):
    assert rewritten().worker_cls == engine_args.V2_CUDA_WORKER_PATH


def test_full_graphs_need_cuda_kernels(rewritten, kernels):
    """The PyTorch twins read the device, which no capture allows."""
    kernels(False)
    assert rewritten().compilation_config.cudagraph_mode.name == "PIECEWISE"
    check(rewritten())
    check(rewritten(cudagraph_mode="NONE"))
    for mode in ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):
        with pytest.raises(UnsupportedError, match=f"cudagraph_mode is {mode}, but"):
            check(rewritten(cudagraph_mode=mode))


def test_with_cuda_kernels_vllm_chooses_the_graphs(rewritten, kernels):
    kernels(True)
    assert rewritten().compilation_config.cudagraph_mode is None
    for mode in ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):
        check(rewritten(cudagraph_mode=mode))


def test_a_full_graph_of_any_batch_becomes_one_of_trees_of_one_size():
    """The model state says what it supports, and vLLM turns ``FULL`` into what fits."""
    from vllm.config import CompilationConfig, CUDAGraphMode

    from vllm_redrafter.engine.v2.model_state import TreeModelState

    support, name = TreeModelState.get_additional_cg_support(None)
    for wanted in ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):
        config = CompilationConfig(cudagraph_mode=wanted)
        got = config.resolve_cudagraph_mode_and_sizes(support, name, 33, use_v2_model_runner=True)
        assert got.decode_mode() is CUDAGraphMode.FULL
        assert got.mixed_mode() is not CUDAGraphMode.FULL
        assert wanted == "FULL" or got.name == wanted


def test_graphs_for_more_requests_than_vllms_sizes_hold(rewritten, kernels):
    kernels(True)
    sizes = rewritten().cudagraph_capture_sizes
    assert {33, 66, 33 * 64} <= set(sizes)


@pytest.mark.parametrize(
    "chosen",
    [
        {"sizes": [7]},
        {"cudagraph_capture_sizes": [7]},
        {"max_cudagraph_capture_size": 99},
        {"eager": True},
        {"cudagraph_mode": "NONE"},
    ],
    ids=str,
)
def test_capture_sizes_that_the_user_chose_stay(rewritten, kernels, chosen):
    kernels(True)
    assert rewritten(**chosen).cudagraph_capture_sizes == chosen.get("sizes")


def test_cuda_needs_v2(cuda):
    with pytest.raises(UnsupportedError, match="needs Model Runner V2 on CUDA"):
        check_engine_args(ARGS)


def test_a_runner_that_changed_its_mind(engine_config, triton, monkeypatch):
    monkeypatch.setattr(checks, "wants_v2", lambda: True)
    monkeypatch.setattr("vllm.config.vllm.VllmConfig.use_v2_model_runner", False)
    with pytest.raises(UnsupportedError, match="chose another model runner"):
        engine_config()


def test_symbols_of_the_other_engine_do_not_matter(engine_config, monkeypatch):
    gone = compat.Hook("vllm.no_such_module:Thing", "x", runner="v2")
    monkeypatch.setattr(compat, "HOOKS", (*compat.HOOKS, gone))
    assert engine_config()
    assert [hook for hook, problem in compat.check_hooks() if problem] == [gone]
