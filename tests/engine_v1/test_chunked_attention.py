# SPDX-License-Identifier: Apache-2.0
"""Llama 4's chunked local attention: plain vLLM's answers, as long as a context is one chunk.

More is refused at start-up (tests/engine_errors/test_unsupported.py).
"""

import pytest
import torch
from tiny_models import EOS, VOCAB, random_drafter, write_byte_tokenizer, write_json
from vllm import SamplingParams

from engine_v1.conftest import SPEC
from engine_v1.engines import Pair, engine
from engine_v1.tiny_target import prompts
from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.engine.checks import UnsupportedError

pytestmark = pytest.mark.slow

CHUNK = 128


@pytest.fixture(scope="module")
def llama4(tmp_path_factory):
    """Four layers, the last without rotary positions and with full attention; no experts."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, num_experts_per_tok=1, num_local_experts=2, moe_layers=[],
        interleave_moe_layer_step=0, attention_chunk_size=CHUNK, no_rope_layer_interval=4,
        use_qk_norm=False, attn_temperature_tuning=False, eos_token_id=EOS, bos_token_id=None,
        pad_token_id=None, architectures=["Llama4ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).float()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    directory = tmp_path_factory.mktemp("models") / "llama4"
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)
    write_json(
        directory / "config.json",
        {**config.to_dict(), "architectures": ["Llama4ForCausalLM"], "dtype": "float32"},
    )
    return directory


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama4-drafter"
    save_drafter(random_drafter(), directory)
    return directory


def test_up_to_the_end_of_the_chunk(llama4, drafter):
    settings = {"max_model_len": CHUNK}
    pair = Pair(engine(llama4, **settings), engine(llama4, drafter, **settings, **SPEC))
    params = SamplingParams(temperature=0, max_tokens=CHUNK, ignore_eos=True)
    run = pair.run(prompts(8), params)
    run.assert_equal()
    run.assert_saw_trees()
    for output in run.got:
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == CHUNK


def test_a_longer_context_is_refused(llama4, drafter):
    with pytest.raises(UnsupportedError, match="max_model_len is 129; set it to 128 or less"):
        engine(llama4, drafter, max_model_len=CHUNK + 1, **SPEC)
