# SPDX-License-Identifier: Apache-2.0
"""Small models made on the spot, so that engine tests need no download and start in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter

VOCAB = 320
HIDDEN = 64
LAYERS = 2
HEADS = 2
HEAD_DIM = 32
EOS = 256

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def llama_tensors(seed: int, context_weight: float) -> dict[str, Tensor]:
    """Weights of a Llama whose next token is a fixed successor of the last one, mostly.

    Attention and MLP add to the residual stream with ``context_weight``: at 0 the last token alone
    decides, above it the context overrules it now and then, so that a draft is often but not
    always right.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    embedding = normal(VOCAB, HIDDEN, std=1.0)
    successor = torch.randperm(EOS, generator=generator)
    # Ids from EOS on are special: nothing leads there by itself.
    head = normal(VOCAB, HIDDEN, std=0.02)
    head[successor] = embedding[:EOS]
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head,
    }
    width, middle = HEADS * HEAD_DIM, LLAMA_CONFIG["intermediate_size"]
    out = context_weight * HIDDEN**-0.5
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}self_attn.q_proj.weight": normal(width, HIDDEN, std=2 * HIDDEN**-0.5),
            f"{layer}self_attn.k_proj.weight": normal(HEAD_DIM, HIDDEN, std=2 * HIDDEN**-0.5),
            f"{layer}self_attn.v_proj.weight": normal(HEAD_DIM, HIDDEN, std=HIDDEN**-0.5),
            f"{layer}self_attn.o_proj.weight": normal(HIDDEN, width, std=3 * out),
            f"{layer}mlp.gate_proj.weight": normal(middle, HIDDEN, std=HIDDEN**-0.5),
            f"{layer}mlp.up_proj.weight": normal(middle, HIDDEN, std=HIDDEN**-0.5),
            f"{layer}mlp.down_proj.weight": normal(HIDDEN, middle, std=out),
        }
    return tensors


def write_llama(directory: Path, *, seed: int = 0, context_weight: float = 1.0) -> Path:
    """A loadable Llama directory with a byte tokenizer, about 0.4 MB."""
    write_hf_config(directory)
    tensors = llama_tensors(seed, context_weight)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_byte_tokenizer(directory)
    return directory


def write_hf_config(directory: Path, **fields: Any) -> Path:
    """Only the Llama's config.json, with ``fields`` changed: enough for configuration checks."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {**LLAMA_CONFIG, **fields})
    return directory


def write_byte_tokenizer(directory: Path) -> None:
    """One token per byte, ``<eos>`` behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"},
    )


def random_drafter(seed: int = 0, **fields: Any) -> Drafter:
    """Random weights that fit the tiny Llama; ``fields`` change its DrafterConfig."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "exit_dim": HIDDEN,
        "num_draft_layers": 1,
        "rnn": True,
        "draft_vocab_size": VOCAB,
    } | fields
    torch.manual_seed(seed)
    return Drafter(DrafterConfig(**values))


def write_random_drafter(directory: Path, seed: int = 0, **fields: Any) -> Path:
    save_drafter(random_drafter(seed, **fields), directory)
    return directory


def greedy_rollouts(target: Path, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the target says after random prompts of two tokens.

    Returns:
        tokens ``[rows, length]`` and the hidden states after the final norm, ``[rows, length, H]``.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(EOS, (rows, 2), generator=generator)
    with torch.inference_mode():
        tokens = model.generate(
            prompts, do_sample=False, max_length=length, min_length=length, pad_token_id=EOS
        )
        hidden = model.model(tokens).last_hidden_state
    return tokens.clone(), hidden.clone()


def write_fitted_drafter(directory: Path, target: Path, *, steps: int = 400, seed: int = 0) -> Path:
    """A drafter that learnt what ``target`` says, in seconds: often right, not always.

    Teacher forcing over three drafted tokens, as in the paper, on the target's own greedy text.
    """
    tokens, hidden = greedy_rollouts(target, rows=96, length=48, seed=seed)
    drafter = random_drafter(seed)
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    drafter.embedding = embedding
    depth = 3
    known = tokens[:, 2:-depth].flatten()
    context = hidden[:, 1 : -depth - 1].flatten(0, 1)
    end = tokens.shape[1] - depth
    later = torch.stack([tokens[:, 2 + d : end + d].flatten() for d in range(1, depth + 1)])
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(known.numel(), (256,), generator=generator)
        state, last, loss = drafter.initial_state(256), known[rows], torch.zeros(())
        for d in range(depth):
            logits, state = drafter(context[rows], last, state)
            loss = loss + torch.nn.functional.cross_entropy(logits, later[d][rows])
            last = later[d][rows]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_drafter(drafter, directory)
    return directory
