# SPDX-License-Identifier: Apache-2.0
"""Calls every operator with arguments that do not fit; run under the sanitizers.

    python wild_inputs.py cpu|cuda COUNT SEED

``cpu``: csrc/cpu, for the instruction set of this machine. ``cuda``: csrc/cuda, emulated. Whatever
is given, an operator must refuse it or run inside its tensors; anything else ends this process.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

BIG = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
WILD_INTS = (0, 1, -1, 2, 3, 7, 63, 64, 65, 1000, *BIG, -(2**63))
WILD_FLOATS = (0.0, -1.0, 1e-40, 1e38, float("nan"), float("inf"), -float("inf"), -50_000.0, -1e9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64,
          torch.bool)  # fmt: skip

# Numbers that say how large the memory at the addresses in `caches` is: nothing can check them, and
# so only values that no memory has are tried.
ADDRESSED = ("block_size", "head_dim", "element_size")

Arguments = dict[str, Any]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def trees(source: random.Random, batch: int = 2, nodes: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, parents and depths ``[batch, nodes]`` int64 of random trees without their root."""
    parents = torch.tensor([[source.randrange(-1, i) for i in range(nodes)] for _ in range(batch)])
    depths = torch.ones_like(parents)
    for b in range(batch):
        for i in range(nodes):
            if parents[b, i] >= 0:
                depths[b, i] = depths[b, parents[b, i]] + 1
    return torch.randint(50, (batch, nodes)), parents, depths


def falling_scores(batch: int, length: int, width: int) -> Tensor:
    """No child is above any possible parent."""
    return -torch.rand(batch, length, width) - torch.arange(length)[:, None]


def empty_like_outputs(batch: int, most: int, words: int = 1) -> Arguments:
    return {
        "out_tokens": torch.empty(batch, most, dtype=torch.int64),
        "out_parents": torch.empty(batch, most, dtype=torch.int64),
        "out_depths": torch.empty(batch, most, dtype=torch.int64),
        "out_masks": torch.empty(batch, most, words, dtype=torch.int64),
        "out_num_nodes": torch.empty(batch, dtype=torch.int64),
    }


def beam_step(source: random.Random) -> Arguments:
    batch, width, vocab = 2, 3, source.choice((5, 700))
    rows = source.choice((1, width))
    return {
        "tokens": torch.empty(batch, width, dtype=torch.int64),
        "parents": torch.empty(batch, width, dtype=torch.int64),
        "scores": torch.empty(batch, width),
        "out_state": torch.empty(batch, width, 4),
        "logits": torch.randn(batch, rows, vocab).to(source.choice(DTYPES[:3])),
        "beam_scores": torch.randn(batch, width),
        "state": torch.randn(batch, rows, 4),
        "draft_vocab": torch.randperm(vocab),
        "top_k": source.choice((0, 2, min(vocab, 64))),
    }


def draft(source: random.Random, packed: bool) -> Arguments:
    from draft_cases import make_drafter, make_inputs

    from vllm_redrafter.ops.draft import _pack, plain_layers

    dtype = source.choice((torch.float32, torch.bfloat16))
    vocab = source.choice((11, 60))
    drafter = make_drafter(
        vocab=60, hidden=source.choice((5, 16)), exit_dim=source.choice((7, 10, 32)),
        blocks=source.randrange(3), rnn=source.random() < 0.7, dtype=dtype,
        draft_vocab=11 if vocab == 11 else None,
    )  # fmt: skip
    context, token = make_inputs(drafter, 2)
    shape = (2, source.choice((1, 3)), 4)
    config = drafter.config
    return {
        "tokens": torch.empty(shape, dtype=torch.int64),
        "parents": torch.empty(shape, dtype=torch.int64),
        "scores": torch.empty(shape),
        "context": context,
        "token": token,
        "embedding": drafter.embedding,
        "draft_vocab": drafter.draft_vocab,
        "layers": _pack(drafter, False) if packed else plain_layers(drafter),
        "head_rows": config.draft_vocab_size,
        "exit_dim": config.exit_dim,
        "num_blocks": config.num_draft_layers,
        "rnn": bool(config.rnn),
        "top_k": source.choice((0, 2)),
    }


def build_tree(source: random.Random) -> Arguments:
    batch, length, width, most = 2, 3, 4, source.choice((1, 8, 70))
    return {
        **empty_like_outputs(batch, most, 2),
        "root": torch.randint(50, (batch,)),
        "tokens": torch.randint(5, (batch, length, width)),
        "parents": torch.randint(width, (batch, length, width)),
        "scores": falling_scores(batch, length, width).sort(2, descending=True).values,
        "best": source.random() < 0.5,
    }


def merge_candidates(source: random.Random) -> Arguments:
    batch, most = 2, source.choice((0, 6, 40))
    outputs = {name: torch.empty(batch, most, dtype=torch.int64)
               for name in ("out_tokens", "out_parents", "out_depths")}  # fmt: skip
    return {
        **outputs,
        "out_scores": torch.empty(batch, most),
        "out_sources": torch.empty(batch, most, dtype=torch.int64),
        "out_counts": torch.empty(batch, dtype=torch.int64),
        "beam_tokens": torch.randint(5, (batch, 3, 4)),
        "beam_parents": torch.zeros(batch, 3, 4, dtype=torch.int64),
        "beam_scores": falling_scores(batch, 3, 4),
        "chain_tokens": torch.randint(5, (batch, 2, 6)),
        "chain_scores": falling_scores(batch, 6, 2).transpose(1, 2).contiguous(),
        "max_depth": torch.randint(8, (batch,)),
    }


def choose_tree(source: random.Random) -> Arguments:
    tokens, parents, depths = trees(source)
    outputs = empty_like_outputs(2, 10)
    return {
        **outputs,
        "out_chosen": torch.empty(2, 10, dtype=torch.int64),
        "root": torch.randint(50, (2,)),
        "tokens": tokens,
        "parents": parents,
        "depths": depths,
        "candidate_counts": torch.tensor([9, 5]),
        "counts": torch.tensor([4, 9]),
    }


def tree_attention(source: random.Random, maps: bool) -> Arguments:
    from paged_cases import attention_case

    from vllm_redrafter.ops.kv_layout import tag

    block_size, head_dim = source.choice((16, 32)), source.choice((16, 64))
    layout = source.choice(("vector", "amx", "random") if maps else ("vector",))
    case = attention_case(
        source.choice(DTYPES[:3]), [source.randrange(40), 0], [source.randrange(1, 9), 3],
        head_dim=head_dim, kv_heads=2, group=2, block_size=block_size, layout=layout,
        softcap=source.choice((0.0, 5.0)), window=source.choice((0, 0, 3, 20)),
        sinks=source.random() < 0.5,
    )  # fmt: skip
    arguments = {"out": torch.empty_like(case.query), **vars(case)}
    if not maps:
        arguments |= {"key_map": None, "value_map": None}
    elif source.random() < 0.5:
        for name in ("key_map", "value_map"):
            arguments[name] = tag(arguments[name], block_size, head_dim)
    return arguments


def walk(source: random.Random) -> Arguments:
    tokens, parents, _ = trees(source)
    return {
        "path": torch.empty(2, 5, dtype=torch.int64),
        "num_accepted": torch.empty(2, dtype=torch.int64),
        "last_node": torch.empty(2, dtype=torch.int64),
        "next_token": torch.empty(2, dtype=torch.int64),
        "tokens": tokens,
        "parents": parents,
        "num_nodes": torch.tensor([9, 4]),
        "target_tokens": torch.randint(50, tokens.shape),
    }


def suffix_lookup(source: random.Random) -> Arguments:
    batch, chains, depth = 2, 3, 5
    return {
        "tokens": torch.empty(batch, chains, depth, dtype=torch.int64),
        "matched": torch.empty(batch, chains, dtype=torch.int64),
        "scores": torch.empty(batch, chains, depth),
        "text": torch.randint(4, (3, 90), dtype=torch.int32),
        "slots": integers(2, 0),
        "starts": integers(0, 3),
        "ends": integers(90, source.randrange(3, 90)),
        "window": source.choice((1, 16, 64)),
        "longest": source.choice((1, 8)),
    }


# The caches that addresses point to must live.
_CACHES: list[Tensor] = []


def move_kv(source: random.Random, maps: bool) -> Arguments:
    from paged_cases import layout_maps

    from vllm_redrafter.ops.move_kv import MoveKV

    keys = [torch.zeros(4, 2, 16, 16) for _ in range(2)]
    values = [torch.zeros(4, 2, 16, 16) for _ in range(2)]
    _CACHES[:] = keys + values
    move = MoveKV(keys, values, *(layout_maps("random", 16, 16) if maps else (None, None)))
    return {
        "caches": move.table,
        "key_map": move.key_map,
        "value_map": move.value_map,
        "src_slots": torch.randint(64, (3,)),
        "dst_slots": torch.tensor([5, -1, 63]),
        "block_size": 16,
        "head_dim": 16,
        "element_size": 4,
    }


def argmax_rows(source: random.Random) -> Arguments:
    values = torch.randn(6, source.choice((1, 70))).to(source.choice(DTYPES[:3]))
    return {"out": torch.empty(4, dtype=torch.int64), "values": values,
            "rows": torch.randint(6, (4,))}  # fmt: skip


def cases(cpu: bool) -> dict[str, Callable[[random.Random], Arguments]]:
    found: dict[str, Callable[[random.Random], Arguments]] = {
        "beam_step": beam_step,
        "draft": lambda source: draft(source, packed=cpu),
        "build_tree": build_tree,
        "merge_candidates": merge_candidates,
        "choose_tree": choose_tree,
        "tree_attention": lambda source: tree_attention(source, cpu and source.random() < 0.8),
        "walk": walk,
        "suffix_lookup": suffix_lookup,
        "move_kv": lambda source: move_kv(source, cpu and source.random() < 0.7),
    }
    return found | {"argmax_rows": argmax_rows} if cpu else found


def other_tensor(tensor: Tensor, source: random.Random, values: bool) -> Tensor | None:
    """Another shape, dtype or stride, or wild values."""
    kind = source.randrange(13 if values else 11)
    if kind == 0:
        return tensor.to(source.choice(DTYPES))
    if kind == 1:
        return tensor.unsqueeze(source.randrange(tensor.dim() + 1))
    if kind == 2:
        return tensor.flatten()
    if kind == 3 and tensor.dim():
        dim = source.randrange(tensor.dim())
        return tensor.narrow(dim, 0, source.randrange(tensor.shape[dim] + 1))
    if kind == 4 and tensor.dim():
        dim = source.randrange(tensor.dim())
        return torch.cat([tensor, tensor], dim) if tensor.shape[dim] else tensor
    if kind == 5:
        return tensor.new_zeros(1).expand(tensor.shape)
    if kind == 6 and tensor.dim() > 1:
        return tensor.transpose(source.randrange(tensor.dim()), source.randrange(tensor.dim()))
    if kind == 7:
        # Nothing in it, and sizes without bounds.
        shape = [source.choice((0, 1, 2, *BIG[:4])) for _ in range(tensor.dim())]
        if 0 in shape:
            return _nothing(shape, tensor.dtype)
        return tensor[:0] if tensor.dim() else tensor
    if kind == 8 and tensor.dim():
        # Elements with gaps between them.
        return torch.stack([tensor, tensor], -1)[..., 0]
    if kind == 9:
        return None
    if kind == 10 and tensor.dim() and tensor.shape[0]:
        shape = list(tensor.shape)
        shape[source.randrange(len(shape))] = source.choice((0, 1, 2**20))
        return tensor.new_zeros(1).expand(shape)
    out = tensor.clone(memory_format=torch.contiguous_format)
    for _ in range(source.randrange(1, 4)):
        if not out.numel():
            break
        at = source.randrange(out.numel())
        if out.dtype.is_floating_point:
            out.view(-1)[at] = source.choice(WILD_FLOATS)
        elif out.dtype != torch.bool:
            limits = torch.iinfo(out.dtype)
            fits = [v for v in WILD_INTS if limits.min <= v <= limits.max]
            out.view(-1)[at] = source.choice((*fits, limits.min, limits.max))
    return out


def _nothing(shape: list[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; torch itself refuses some shapes, though nothing is in them."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        return torch.empty([0] * len(shape), dtype=dtype)


def spoil(arguments: Arguments, source: random.Random) -> str:
    """Change one argument in place; says which."""
    name = source.choice(list(arguments))
    value = arguments[name]
    if name == "layers":
        layers = list(value)
        at = source.randrange(len(layers))
        layers[at] = other_tensor(layers[at], source, True)
        if layers[at] is None or source.random() < 0.2:
            del layers[at]
        arguments[name] = layers
    elif isinstance(value, Tensor):
        arguments[name] = other_tensor(value, source, values=name != "caches")
    elif isinstance(value, bool):
        arguments[name] = not value
    elif name in ADDRESSED:
        arguments[name] = source.choice((0, -1, 3, *BIG[1:]))
    elif isinstance(value, int):
        arguments[name] = source.choice(WILD_INTS)
    elif isinstance(value, float):
        arguments[name] = source.choice(WILD_FLOATS)
    else:
        arguments[name] = torch.zeros(3)
    return name


def run(operators: Any, cpu: bool, count: int, seed: int) -> Counter[str]:
    """Calls by what came of them, such as "walk refused"."""
    outcomes: Counter[str] = Counter()
    for name, make in cases(cpu).items():
        operator = getattr(operators, name)
        for number in range(count):
            source = random.Random(f"{seed} {name} {number}")
            torch.manual_seed(number)
            arguments = make(source)
            spoilt = [spoil(arguments, source) for _ in range(source.choice((0, 1, 1, 1, 2, 3)))]
            # The last line before a sanitizer's report says which call it was.
            print(name, number, spoilt, file=sys.stderr, flush=True)
            try:
                operator(*arguments.values())
                outcomes[f"{name} ran"] += 1
            except (RuntimeError, MemoryError, NotImplementedError) as error:
                assert spoilt, (name, number, error)
                outcomes[f"{name} refused"] += 1
    return outcomes


def main() -> None:
    which, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    from emulation.build import load, load_cpu

    outcomes = run(load_cpu() if which == "cpu" else load(), which == "cpu", count, seed)
    for name in sorted(outcomes):
        print(name, outcomes[name])


if __name__ == "__main__":
    main()
