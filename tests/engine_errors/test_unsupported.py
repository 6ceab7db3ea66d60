# SPDX-License-Identifier: Apache-2.0
"""Engines that ReDrafter refuses, at configuration time and with the cure."""

from types import SimpleNamespace

import pytest
import tiny_models

from vllm_redrafter.engine import checks, compat
from vllm_redrafter.engine.checks import UnsupportedError
from vllm_redrafter.engine.engine_args import options_of
from vllm_redrafter.engine.target_shape import Shape, TargetShape, shape_of, shape_of_model

TREES = TargetShape(Shape.TREE)


@pytest.fixture
def message(engine_config):
    def refused(**kwargs):
        with pytest.raises(UnsupportedError) as raised:
            engine_config(**kwargs)
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".")
        return text

    return refused


@pytest.mark.parametrize(
    "field, feature, why",
    [
        ("pipeline_parallel_size", "pipeline parallelism", "a rank before the last"),
        ("decode_context_parallel_size", "decode context parallelism", "a rank then holds some"),
        ("prefill_context_parallel_size", "prefill context parallelism", "a rank then holds some"),
    ],
)
def test_parallel_sizes(message, field, feature, why):
    text = message(tensor_parallel_size=2, **{field: 2})
    assert f"does not support {feature} ({field}=2): {why}" in text and "; set it to 1." in text


@pytest.mark.parametrize(
    "field, feature",
    [
        ("enable_expert_parallel", "expert parallelism"),
        ("enable_batch_sharded_sampling", "sampling that is shared out among ranks"),
    ],
)
def test_parallel_modes(message, field, feature):
    text = message(tensor_parallel_size=2, **{field: True})
    assert f"does not support {feature}; leave {field} off" in text


def test_experts_that_replicas_share(message):
    text = message(enable_expert_parallel=True, data_parallel_size=2)
    assert "expert parallelism with data parallelism (data_parallel_size=2)" in text
    assert "leave enable_expert_parallel off and set data_parallel_size to 1." in text


def test_tensor_parallel_is_no_obstacle(engine_config):
    assert engine_config(tensor_parallel_size=2).parallel_config.world_size == 2


def test_data_parallel_experts(message, tmp_path):
    model = tiny_models.write_hf_config(
        tmp_path / "model", architectures=["MixtralForCausalLM"], model_type="mixtral",
        num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    text = message(model=model, data_parallel_size=2)
    assert "data parallelism for mixture-of-experts targets" in text
    assert "(data_parallel_size=2); set it to 1" in text


def test_data_parallel_is_no_obstacle_without_experts(engine_config):
    assert engine_config(data_parallel_size=2).parallel_config.data_parallel_size == 2


@pytest.mark.parametrize("as_object", [True, False])
def test_kv_connector(message, as_object):
    from vllm.config import KVTransferConfig

    fields = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    text = message(kv_transfer_config=KVTransferConfig(**fields) if as_object else fields)
    assert "KV connectors" in text and "remove kv_transfer_config" in text


def test_another_worker(message):
    text = message(worker_cls="some.package.Worker")
    assert "cannot use worker_cls 'some.package.Worker'; leave worker_cls at 'auto'" in text


def test_forced_model_runner_v2(message, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "VLLM_USE_V2_MODEL_RUNNER=1 forces V2; unset it" in message()


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_fp8_kv_cache(message, dtype):
    assert f"kv_cache_dtype '{dtype}' yet; leave it at 'auto'" in message(
        kv_cache_dtype=dtype
    )


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "turboquant_4bit_nc", "nvfp4"])
def test_packed_kv_caches(message, dtype):
    assert f"kv_cache_dtype '{dtype}' yet; leave it at 'auto'" in message(kv_cache_dtype=dtype)


def test_async_scheduling_on_v1(message):
    text = message(async_scheduling=True)
    assert "does not support async_scheduling on Model Runner V1" in text and "leave it out" in text


def test_async_scheduling_may_be_refused_by_the_user(engine_config):
    assert engine_config(async_scheduling=False).scheduler_config.async_scheduling is False


def test_kv_offloading(message):
    """By its own name: the user never gave a KV connector."""
    text = message(kv_offloading_size=1.0)
    assert "does not support KV offloading" in text
    assert text.endswith("(kv_offloading_size=1.0); leave it out.")


def test_fast_prefill_of_shared_kv(message):
    text = message(kv_sharing_fast_prefill=True)
    assert "does not support kv_sharing_fast_prefill" in text and text.endswith("leave it off.")


@pytest.mark.parametrize(
    "given",
    [
        {"enable_return_routed_experts": True},
        {"aux_output_config": {"enable_return_routed_experts": True}},
    ],
    ids=["flag", "object"],
)
@pytest.mark.parametrize("v2", [False, True])
def test_routed_experts(message, monkeypatch, given, v2):
    monkeypatch.setattr(checks, "wants_v2", lambda: v2)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", v2)
    text = message(**given)
    assert "does not support enable_return_routed_experts" in text
    assert text.endswith("leave it off.")


def model_of(target, **fields):
    """What the checks read of a ModelConfig."""
    from vllm.config import ModelConfig

    model = ModelConfig(model=str(target))
    for name, value in fields.items():
        setattr(model, name, value)
    return model


def test_chunked_local_attention(target):
    """Llama 4: the engine died at the first context of two chunks."""
    shape = shape_of_model(model_of(target, attention_chunk_size=128), cpu=True)
    assert shape.shape is Shape.REFUSED
    assert shape.why == (
        "ReDrafter does not support chunked local attention (LlamaForCausalLM) over contexts of "
        "more than one chunk, and max_model_len is 512; set it to 128 or less."
    )


@pytest.mark.parametrize("chunk", [None, 512, 8192])
def test_contexts_of_one_chunk_are_no_obstacle(target, chunk):
    assert shape_of_model(model_of(target, attention_chunk_size=chunk), cpu=True) == TREES


def test_another_platform(message, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert "on vLLM's CPU platform in this release" in message()


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.0.0"])
def test_wrong_version(message, monkeypatch, version):
    monkeypatch.setattr(checks, "vllm_version", lambda: version)
    text = message()
    assert f"not {version}; install a tested version" in text
    assert "tested on Model Runner V1 with vLLM 0.32.0, not" in text


def test_each_runner_has_versions_of_its_own(monkeypatch):
    """0.33.0 was run on Model Runner V2 only."""
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.33.0")
    checks.check_version("v2")
    with pytest.raises(UnsupportedError, match="V1 with vLLM 0.32.0, not 0.33.0"):
        checks.check_version("v1")


@pytest.mark.parametrize(
    "hook, problem",
    [
        (compat.Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner._gone", "x"), "missing"),
        (compat.Hook("vllm.no_such_module:Thing", "x"), "missing"),
        (
            compat.Hook(f"{compat.RUNNER}._sample", "x", parameters=("logits", "gone")),
            "has no parameter 'gone'",
        ),
        (
            compat.Hook("vllm.v1.outputs:SamplerOutput", "x", fields=("gone",)),
            "has no field 'gone'",
        ),
    ],
    ids=["method", "module", "parameter", "field"],
)
def test_moved_hook(message, monkeypatch, hook, problem):
    monkeypatch.setattr(compat, "HOOKS", (*compat.HOOKS, hook))
    text = message()
    assert f"does not fit this vllm-redrafter: {hook.where} {problem}" in text
    assert f"install a tested version ({compat.tested_versions('v1')[0]})" in text


def test_pooling_runner(message):
    text = message(runner="pooling")
    assert "drafts for text generation, not for runner 'pooling'; leave it out" in text


# Only config.json is needed: the refusal comes before weights are looked for. vLLM inspects every
# architecture once in a process of its own (about 10 s, cached afterwards), so the wider list is
# slow.
ENCODER = "encoder-decoder models"
MAMBA = {"state_size": 16, "conv_kernel": 4, "expand": 2}
QWEN2 = {"model_type": "qwen2", "sliding_window": 128}
MODELS = [
    ("MambaForCausalLM", "Mamba 1 layers", {"model_type": "mamba", "time_step_rank": 4, **MAMBA}),
    ("BartForConditionalGeneration", ENCODER,
     {"model_type": "bart", "d_model": 64, "is_encoder_decoder": True}),
]  # fmt: skip
MORE_MODELS = [
    ("JambaForCausalLM", "Mamba 1 layers", {"model_type": "jamba"}),
    ("FalconH1ForCausalLM", "Mamba 2 layers", {"model_type": "falcon_h1"}),
    ("Qwen3NextForCausalLM", "gated delta net layers", {"model_type": "qwen3_next"}),
    ("WhisperForConditionalGeneration", ENCODER,
     {"model_type": "whisper", "d_model": 64, "is_encoder_decoder": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    "architecture, feature, fields",
    [*MODELS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_MODELS)],
    ids=[row[0] for row in (*MODELS, *MORE_MODELS)],
)
def test_unsupported_model(message, tmp_path, architecture, feature, fields):
    model = tiny_models.write_hf_config(tmp_path / "model", architectures=[architecture], **fields)
    text = message(model=model)
    assert f"does not support {feature} ({architecture})" in text
    assert "; use a decoder-only target" in text


def test_mla_is_no_obstacle(engine_config, tmp_path):
    """It gets chains, no longer than the draft has tokens along a path."""
    model = tiny_models.write_hf_config(
        tmp_path / "model", architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3",
        kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    config = engine_config(model=model, options={"prompt_lookup_num_tokens": 7})
    assert shape_of(config).shape is Shape.CHAIN
    assert config.speculative_config.num_speculative_tokens == 7
    assert options_of(config).num_speculative_tokens == 7


class FakeAttention:
    """What the checks read of one of vLLM's implementations."""

    def __init__(self, head_size=64, **fields):
        self.head_size, self.alibi_slopes = head_size, None
        vars(self).update(fields)


def refused_layers(*impls, **limits):
    layers = {f"layer {i}": SimpleNamespace(impl=impl) for i, impl in enumerate(impls)}
    with pytest.raises(UnsupportedError) as raised:
        checks.check_layers(layers, (FakeAttention,), **limits)
    return str(raised.value)


def test_attention_that_is_not_ours_to_compute():
    assert "the attention implementation SimpleNamespace (layer 'layer 1')" in refused_layers(
        FakeAttention(), SimpleNamespace()
    )
    assert "ALiBi (layer 'layer 0')" in refused_layers(FakeAttention(alibi_slopes=[1.0]))


def test_heads_too_large_for_our_kernels():
    text = refused_layers(FakeAttention(256), FakeAttention(512), most_head_size=256)
    assert "does not support heads of 512 here, at most 256 (layer 'layer 1')" in text


def test_heads_of_several_sizes_in_one_group():
    """One map says where everything is in a group."""
    text = refused_layers(FakeAttention(64), FakeAttention(128))
    assert "heads of 64 and of 128 in one group of layers (layer 'layer 1')" in text


def test_windows_and_sinks_are_no_obstacle():
    layers = {"one": SimpleNamespace(impl=FakeAttention(sliding_window=9, sinks=[0.0]))}
    checks.check_layers(layers, (FakeAttention,))


def test_sliding_windows_are_no_obstacle(engine_config, tmp_path):
    model = tiny_models.write_hf_config(
        tmp_path / "model", architectures=["MistralForCausalLM"], model_type="mistral",
        sliding_window=128,
    )  # fmt: skip
    assert engine_config(model=model).model_config.get_sliding_window() == 128


def test_a_sliding_window_that_is_switched_off_is_no_obstacle(engine_config, tmp_path):
    model = tiny_models.write_hf_config(
        tmp_path / "model", architectures=["Qwen2ForCausalLM"], **QWEN2,
        use_sliding_window=False, max_window_layers=2,
    )  # fmt: skip
    assert engine_config(model=model)
