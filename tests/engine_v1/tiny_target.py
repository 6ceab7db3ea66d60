# SPDX-License-Identifier: Apache-2.0
"""A random Llama of a few hundred kilobytes whose greedy output is varied, and drafters for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import EOS, write_byte_tokenizer

from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter

# One token per byte and the end token, as the byte tokenizer has them.
VOCAB = EOS + 1
HIDDEN = 64
HEAD_DIM = 32
HEADS, KV_HEADS = 4, 2
LAYERS = 2
MLP = 128


def write_target(
    directory: Path,
    *,
    vocab: int = VOCAB,
    seed: int = 0,
    logit_scale: float = 3.0,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    layers: int = LAYERS,
    tied: bool = False,
) -> Path:
    """Write a random-weight Llama, float32, with a byte tokenizer if it has its vocabulary.

    Matrices keep the scale of their input and the embedding is as large as what the layers add,
    so the next token depends on the whole context and greedy decoding does not settle on one.

    Args:
        directory: made if missing.
        logit_scale: about the standard deviation of a row of logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (scale / columns**0.5)

    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    if not tied:
        weights["lm_head.weight"] = matrix(vocab, HIDDEN, logit_scale)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            # Larger queries and keys make attention peaked: a wrong mask or position then shows.
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_dim, HIDDEN, 1.5),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, HIDDEN, 1.5),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, HIDDEN, 2.0),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, heads * head_dim, 2.0),
            f"{prefix}.mlp.gate_proj.weight": matrix(MLP, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(MLP, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, MLP),
        }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": EOS if vocab > EOS else None,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    if vocab == VOCAB:
        write_byte_tokenizer(directory)
    return directory


def tiny_drafter(seed: int = 1, vocab: int = VOCAB) -> Drafter:
    """A recurrent drafter with random weights for ``write_target``'s model."""
    torch.manual_seed(seed)
    return Drafter(
        DrafterConfig(
            vocab_size=vocab,
            hidden_size=HIDDEN,
            exit_dim=HIDDEN,
            num_draft_layers=1,
            rnn=True,
            draft_vocab_size=vocab,
        )
    )


def write_taught_drafter(
    directory: Path, target: Path, texts: list[list[int]], draft_length: int = 4
) -> Path:
    """Write a drafter that has learnt ``texts`` by heart, more or less: often right, seldom sure.

    Takes a few seconds: it is a network of 50,000 weights.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    drafter = tiny_drafter()
    drafter.embedding = model.get_input_embeddings().weight.detach()
    contexts, windows = [], []
    for text in texts:
        with torch.no_grad():
            states = model.model(torch.tensor([text])).last_hidden_state[0]
        for at in range(1, len(text) - draft_length):
            contexts.append(states[at - 1])
            windows.append(text[at : at + draft_length + 1])
    context, window = torch.stack(contexts), torch.tensor(windows)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    for _ in range(50):
        state = drafter.initial_state(len(window))
        loss = torch.zeros(())
        for depth in range(draft_length):
            logits, state = drafter(context, window[:, depth], state)
            loss = loss + torch.nn.functional.cross_entropy(logits, window[:, depth + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_drafter(drafter, directory)
    return directory


def prompts(count: int, *, shortest: int = 3, longest: int = 40, seed: int = 7) -> list[list[int]]:
    """Random token-id prompts of mixed length, all different, without the end token."""
    source = random.Random(seed)
    return [
        [source.randrange(EOS) for _ in range(source.randint(shortest, longest))]
        for _ in range(count)
    ]
