# SPDX-License-Identifier: Apache-2.0
"""Small targets, datasets and engines for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import EOS, greedy_rollouts, write_llama
from torch import Tensor

from vllm_redrafter.drafter.beam_search import beam_search
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.training.data import Item, _totals, _write_shard
from vllm_redrafter.training.files import write_json
from vllm_redrafter.training.generate import Answer, Request
from vllm_redrafter.training.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from vllm_redrafter.tree.build import build_tree
from vllm_redrafter.tree.walk import walk_greedy

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

# Ids of a to z in the byte tokenizer, whose first token is "!".
LETTERS = (ord("a") - 33, ord("z") - 33 + 1)


def write_chat_target(directory: Path, template: str | None = CHAT_TEMPLATE) -> Path:
    """The tiny Llama with successor text, and a chat template."""
    write_llama(directory, context_weight=0.3)
    if template is not None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return directory


def write_dataset(directory: Path, texts: Tensor, prompt: int = 2, shards: int = 2) -> Path:
    """``texts`` ``[n, length]`` as `data` would have written them."""
    directory.mkdir(parents=True)
    entries = []
    for number, part in enumerate(texts.tensor_split(shards)):
        items = [Item(row.tolist(), prompt, 0.0, False, hash(tuple(row.tolist())) >> 1)
                 for row in part]  # fmt: skip
        entries.append(_write_shard(directory, number, items, {}))
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "target": "tiny", "vocab_size": 320,
                "shards": entries, "totals": _totals(entries), "complete": True}  # fmt: skip
    write_json(directory / MANIFEST, manifest)
    return directory


class FakeEngine:
    """Answers at once, from the prompt and the seed.

    Args:
        fail_at: raise ``error`` at this call (from 0) and all later ones.
    """

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls: list[list[Request]] = []
        self.stopped = False
        self._fail_at, self._error = fail_at, error

    def generate(self, requests: list[Request], seed: int) -> list[Answer]:
        if self._fail_at is not None and len(self.calls) >= self._fail_at:
            raise self._error
        self.calls.append(requests)
        answers = []
        for i, request in enumerate(requests):
            generator = torch.Generator().manual_seed(hash((seed, i, tuple(request.prompt))) >> 2)
            ids = torch.randint(*LETTERS, (24,), generator=generator).tolist()
            answers.append(Answer([*ids, EOS], True))
        return answers

    def stop(self) -> None:
        self.stopped = True

    def start(self, *_: Any, **__: Any) -> list[FakeEngine]:
        return [self]


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(count)))
    return path


def tokens_per_step(target: Path, drafter_dir: Path, rows: int = 8, seed: int = 5) -> float:
    """Acceptance on greedy text that no training saw: W=4, L=3, trees of 7 nodes."""
    texts, hidden = greedy_rollouts(target, rows=rows, length=40, seed=seed)
    tables = load_file(target / "model.safetensors")
    drafter = load_drafter(
        drafter_dir,
        embedding=tables["model.embed_tokens.weight"],
        lm_head=tables["lm_head.weight"],
        dtype=torch.float32,
    )
    steps = said = 0
    for text, states in zip(texts, hidden, strict=True):
        at = 1
        while at + 5 < len(text):
            beams = beam_search(drafter, states[None, at], text[None, at + 1], 4, 3)
            tree = build_tree(beams, "best", 7)
            # Along the accepted path the target's word at depth d is the text's.
            choices = text[at + 2 + tree.depths]
            accepted = int(walk_greedy(tree, choices).num_accepted[0])
            steps, said, at = steps + 1, said + accepted + 1, at + accepted + 1
    return said / steps
