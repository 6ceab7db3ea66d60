# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU: CUDA graph replays against the floor, the twins and other kernels.

    python benchmarks/gpu/ops.py --out DIR [--stages draft walk] [--models llama-8b] [--again]
    python benchmarks/gpu/ops.py --out DIR --rehearse      # tiny shapes on the CPU, no GPU needed

Every stage writes DIR/<stage>.json when it is done, and a later run with the same device, versions
and arguments skips it (--again repeats it). DIR/ops_gpu.json and DIR/ops_gpu.md are then made of
all stages there are; a stage without a file says "not run".

Times are medians of replays, in microseconds per call. A graph holds many calls, on different
caches where one cache would fit into L2, as a model's other layers come between in reality. The
twins read from the host and are timed eagerly, between CUDA events. Rehearsals time single calls
with the wall clock, and their figures mean nothing.

Floor: the bytes that have to be read, over the bandwidth of the stage "bandwidth" (a sum over
memory larger than any cache).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams, beam_search
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops import reference
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.draft import CompiledDraft
from vllm_redrafter.ops.library import cuda_architectures, has_kernel, why_not
from vllm_redrafter.ops.move_kv import MoveKV
from vllm_redrafter.ops.tree_attention import tree_attention
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.tree.build import build_tree as twin_build_tree
from vllm_redrafter.tree.walk import walk_greedy

STAGES = ("bandwidth", "draft", "build_tree", "tree_attention", "walk", "move_kv")
# The most that ours / other or, in microseconds, ours may be.
TARGETS = {
    "tree_attention": ("flash", 1.3),
    "draft": ("floor", 1.3),
    "build_tree": ("us", 50.0),
    "walk": ("us", 50.0),
    "move_kv": ("us", 50.0),
}
# flash_attn's own paged kernel takes blocks of 256 tokens only; vLLM's takes any multiple of 16.
BLOCK, FLASH_ATTN_BLOCK = 16, 256
REFUSED = (RuntimeError, ValueError, NotImplementedError, TypeError)


@dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    layers: int
    draft_vocab: int


MODELS = {
    "llama-8b": Model(32, 8, 128, 4096, 32, 16384),
    "llama-70b": Model(64, 8, 128, 8192, 80, 16384),
}
TINY = {"tiny": Model(4, 2, 32, 64, 2, 128)}


@dataclass
class Run:
    """What all stages share: where, how long, and what was measured before."""

    device: torch.device
    models: dict[str, Model]
    batches: list[int]
    contexts: list[int]
    nodes: list[int]
    replays: int
    bandwidth: float = 0.0  # bytes per second

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def free_bytes(self) -> int:
        if not self.cuda:
            return 1 << 30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0] * 0.9)

    def kernel(self) -> str:
        """Why our operators cannot run here; '' if they can."""
        if has_kernel(self.device):
            return ""
        return "not run: " + (why_not() or "the library was built without CUDA kernels")

    def us(self, calls: list[Callable[[], object]], graph: bool = True) -> float | str:
        """Median microseconds per call; a sentence if a kernel refuses."""
        try:
            if not self.cuda:
                calls[0]()
                times = []
                for _ in range(self.replays):
                    start = time.perf_counter()
                    for call in calls:
                        call()
                    times.append((time.perf_counter() - start) * 1e6)
                return statistics.median(times) / len(calls)
            replay = self._graph(calls) if graph else lambda: [call() for call in calls]
            replay()
            torch.cuda.synchronize()
            times = []
            for _ in range(self.replays):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)
            return statistics.median(times) / len(calls)
        except REFUSED as error:
            return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"

    @staticmethod
    def _graph(calls: list[Callable[[], object]]) -> Callable[[], None]:
        # Outside a capture first: libraries make their workspaces at the first call.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay


def row(stage: str, model: str, shape: dict, **columns: float | str) -> dict:
    """One line of the results; ``columns`` are microseconds or a sentence."""
    other, most = TARGETS[stage]
    ours = columns["ours"]
    value: float | str = "not run"
    if isinstance(ours, float):
        if other == "us":
            value = ours
        elif isinstance(columns.get(other), float):
            value = ours / columns[other]
    met = value <= most if isinstance(value, float) else "not run"
    return {
        "model": model, "shape": shape, "us": columns,
        "target": {"of": other, "most": most, "value": value, "met": met},
    }  # fmt: skip


def not_run(stage: str, model: str, shape: dict, why: str) -> dict:
    return row(stage, model, shape, ours=f"not run: {why}")


# ---- stages ------------------------------------------------------------------------------------


def bandwidth(run: Run) -> Iterator[dict]:
    size = (4 << 30) if run.cuda else (8 << 20)
    memory = torch.ones(min(size, run.free_bytes() // 2) // 4, device=run.device)
    taken = run.us([memory.sum])
    if isinstance(taken, str):
        raise SystemExit(f"Reading memory {taken}")
    yield {"bytes": memory.nbytes, "us": {"read": taken}, "gb_per_s": memory.nbytes / taken / 1e3}


def make_drafter(run: Run, model: Model) -> Drafter:
    vocab = 2 * model.draft_vocab
    config = DrafterConfig(
        vocab_size=vocab,
        hidden_size=model.hidden,
        exit_dim=model.hidden,
        num_draft_layers=2,
        rnn=True,
        draft_vocab_size=model.draft_vocab,
    )
    dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with run.device:
            drafter = Drafter(config).requires_grad_(False)
            for parameter in drafter.parameters():
                parameter.normal_(std=math.sqrt(2.0 / parameter.shape[-1]))
            drafter.embedding = torch.randn(vocab, model.hidden)
            drafter.draft_vocab = torch.randperm(vocab)[: model.draft_vocab]
    finally:
        torch.set_default_dtype(before)
    return drafter.eval()


def draft_bytes(drafter: Drafter, length: int) -> int:
    """What must be read: every weight once a step, less what the step does not need.

    The context's half of the input projection counts once, as its product is the same at every
    step, and the state's weights count from the second step on, as the first state is zero.
    """
    whole = sum(parameter.nbytes for parameter in drafter.parameters())
    context = drafter.input_proj.weight.nbytes // 2 if drafter.config.has_input_proj else 0
    return length * whole - (length - 1) * context - drafter.rnn_u.weight.nbytes


def draft(run: Run) -> Iterator[dict]:
    settings = {"beam_width": 8, "draft_length": 4, "top_k": 0}
    for name, model in run.models.items():
        shapes = [{"batch": batch, "W": 8, "L": 4} for batch in run.batches]
        need = 2 * 2 * model.hidden * (9 * model.hidden + 4 * model.draft_vocab)
        if need > run.free_bytes():
            yield from (not_run("draft", name, s, "weights do not fit memory") for s in shapes)
            continue
        drafter = make_drafter(run, model)
        compiled = CompiledDraft(drafter, **settings)
        for shape in shapes:
            batch = shape["batch"]
            context = torch.randn(batch, model.hidden, device=run.device).bfloat16()
            token = torch.randint(model.draft_vocab, (batch,), device=run.device)

            def ours(run_it=compiled, context=context, token=token):
                return run_it(context, token)

            def twin(drafter=drafter, context=context, token=token):
                return beam_search(drafter, context, token, **settings)

            why = run.kernel()
            if not why and not compiled.compiled:
                why = f"not run: no compiled draft for {run.device.type}"
            yield row(
                "draft", name, shape,
                ours=why or run.us([ours]),
                twin=run.us([twin], graph=False),
                floor=draft_bytes(drafter, settings["draft_length"]) / run.bandwidth * 1e6,
            )  # fmt: skip
        del drafter, compiled


def random_beams(run: Run, batch: int, nodes: int) -> Beams:
    width, length = (16, 4) if nodes > 32 else (8, 4) if nodes > 12 else (4, 3)
    shape = (batch, length, width)
    scores = (torch.rand(shape).sort(dim=-1, descending=True).values * -3).cumsum(1)
    beams = Beams(
        torch.zeros(batch, dtype=torch.int64),
        torch.randint(8192, shape),
        (torch.arange(width) // 2).expand(shape).contiguous(),
        scores.sort(dim=-1, descending=True).values,
    )
    return Beams(**{key: tensor.to(run.device) for key, tensor in vars(beams).items()})


def tree_stage(
    run: Run, stage: str, calls: Callable[[Beams, int], tuple[Callable, Callable]]
) -> Iterator[dict]:
    """A stage that does not depend on the model: one row per batch and tree size."""
    for batch in run.batches:
        for nodes in run.nodes:
            ours, twin = calls(random_beams(run, batch, nodes), nodes)
            yield row(
                stage, "any", {"batch": batch, "nodes": nodes},
                ours=run.kernel() or run.us([ours] * (20 if run.cuda else 2)),
                twin=run.us([twin], graph=False),
            )  # fmt: skip


def build_tree_stage(run: Run) -> Iterator[dict]:
    def calls(beams: Beams, nodes: int) -> tuple[Callable, Callable]:
        here = Beams(**{key: tensor.cpu() for key, tensor in vars(beams).items()})
        return (
            lambda: build_tree(beams, "best", nodes - 1),
            lambda: twin_build_tree(here, "best", nodes - 1).packed_mask(),
        )

    return tree_stage(run, "build_tree", calls)


def walk_stage(run: Run) -> Iterator[dict]:
    def calls(beams: Beams, nodes: int) -> tuple[Callable, Callable]:
        tree, _ = build_tree(beams, "best", nodes - 1)
        target = tree.tokens.roll(-1, 1).contiguous()
        here = type(tree)(**{key: tensor.cpu() for key, tensor in vars(tree).items()})
        there = target.cpu()
        return lambda: walk(tree, target), lambda: walk_greedy(here, there)

    return tree_stage(run, "walk", calls)


def paged_cache(run: Run, model: Model, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """K and V as vLLM has them on GPUs, ``[blocks, block, kv_heads, head_dim]``."""
    shape = (2, blocks, block, model.kv_heads, model.head_dim)
    both = torch.randn(shape, device=run.device, dtype=torch.bfloat16)
    return both[0], both[1]


def move_kv(run: Run) -> Iterator[dict]:
    for name, model in run.models.items():
        for batch in run.batches:
            per_request = 4
            caches = [
                paged_cache(run, model, batch * per_request, BLOCK) for _ in range(model.layers)
            ]
            # Views in the operator's order, heads before tokens.
            keys = [key.transpose(1, 2) for key, _ in caches]
            values = [value.transpose(1, 2) for _, value in caches]
            base = torch.arange(batch, device=run.device)[:, None] * per_request * BLOCK + 40
            moves = torch.tensor([[4, 7], [2, 3]], device=run.device)
            src, dst = (base + moves[0]).flatten(), (base + moves[1]).flatten()
            mover = MoveKV(keys, values)

            def ours(mover=mover, src=src, dst=dst):
                mover(src, dst)

            def twin(keys=keys, values=values, src=src, dst=dst):
                reference.move_kv(keys, values, None, None, src, dst)

            yield row(
                "move_kv", name, {"batch": batch, "layers": model.layers, "rows": 2 * batch},
                ours=run.kernel() or run.us([ours] * (20 if run.cuda else 2)),
                twin=run.us([twin], graph=False),
            )  # fmt: skip


# ---- attention ---------------------------------------------------------------------------------


@functools.cache
def flash_kernel(device: str) -> tuple[str, Callable | None]:
    """Which causal FlashAttention is measured, and its function; None for PyTorch's."""
    if device == "cuda":
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func

            return "vLLM flash_attn_varlen_func", flash_attn_varlen_func
        except ImportError:
            pass
        try:
            from flash_attn import flash_attn_with_kvcache

            return "flash_attn flash_attn_with_kvcache", flash_attn_with_kvcache
        except ImportError:
            pass
    return "torch SDPA, dense K and V with repeated heads", None


class Attention:
    """One shape: caches for several layers, and calls of every kernel on them."""

    def __init__(self, run: Run, model: Model, batch: int, context: int, rows: int) -> None:
        self.run, self.model, self.batch, self.context, self.rows = run, model, batch, context, rows
        self.keys = context + rows
        name, self.flash_function = flash_kernel(run.device.type)
        self.block = FLASH_ATTN_BLOCK if name.startswith("flash_attn ") else BLOCK
        self.per_request = -(-self.keys // self.block)
        self.cache_bytes = (
            2 * 2 * batch * self.per_request * self.block * model.kv_heads * model.head_dim
        )
        self.read_bytes = 2 * 2 * batch * self.keys * model.kv_heads * model.head_dim
        self.scale = model.head_dim**-0.5

    def fits(self) -> bool:
        return self.cache_bytes * 2 < self.run.free_bytes()

    def make(self) -> None:
        run, model, batch, rows = self.run, self.model, self.batch, self.rows
        device = run.device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if run.cuda else 0
        wanted = max(1, -(-3 * l2 // self.cache_bytes)) if run.cuda else 2
        layers = max(1, min(wanted, model.layers, run.free_bytes() // 2 // self.cache_bytes))
        blocks = batch * self.per_request
        self.caches = [paged_cache(run, model, blocks, self.block) for _ in range(layers)]
        order = torch.randperm(blocks, device=device).to(torch.int32)
        self.table = order.view(batch, self.per_request)
        total = batch * rows
        shape = (total, model.heads, model.head_dim)
        self.query = torch.randn(shape, device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.query)
        self.index = torch.arange(batch, dtype=torch.int32, device=device)
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
        self.count = torch.full_like(self.index, rows)
        self.context_lens = torch.full_like(self.index, self.context)
        self.lens = self.context_lens + self.count
        sees = torch.eye(rows, dtype=torch.bool)
        for node in range(1, rows):
            sees[node] |= sees[int(torch.randint(node, ()))]
        self.sees = {"tree": sees, "chain": torch.ones(rows, rows, dtype=torch.bool).tril()}
        self.masks = {
            kind: self._words(visible).repeat(batch, 1).to(device)
            for kind, visible in self.sees.items()
        }

    @staticmethod
    def _words(visible: Tensor) -> Tensor:
        rows = visible.shape[0]
        words = -(-rows // 64)
        bits = torch.zeros(rows, words * 64, dtype=torch.int64)
        bits[:, :rows] = visible.long()
        return (bits.view(rows, words, 64) << torch.arange(64)).sum(-1)

    def arguments(self, layer: int, kind: str) -> tuple:
        key, value = self.caches[layer]
        return (
            self.out, self.query, key.transpose(1, 2), value.transpose(1, 2), None, None,
            self.table, self.index, self.starts[:-1], self.count, self.context_lens,
            self.masks[kind], self.scale,
        )  # fmt: skip

    def each(self, call: Callable[[int], object]) -> list[Callable[[], object]]:
        return [functools.partial(call, layer) for layer in range(len(self.caches))]

    def ours(self, layer: int, kind: str = "tree") -> Tensor:
        tree_attention(*self.arguments(layer, kind))
        return self.out

    def twin(self, layer: int) -> None:
        reference.tree_attention(*self.arguments(layer, "tree"), 0.0)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, keys, kv_heads, head_dim]``, out of the blocks."""
        table = self.table.long()
        key, value = (
            cache[table].flatten(1, 2)[:, : self.keys].contiguous() for cache in self.caches[layer]
        )
        return key, value

    def flash(self) -> Callable[[int], Tensor]:
        """Causal attention of as many rows."""
        model, batch, rows = self.model, self.batch, self.rows
        name, function = flash_kernel(self.run.device.type)
        if name.startswith("vLLM"):
            return lambda layer: function(
                q=self.query, k=self.caches[layer][0], v=self.caches[layer][1],
                max_seqlen_q=rows, cu_seqlens_q=self.starts, max_seqlen_k=self.keys,
                seqused_k=self.lens, softmax_scale=self.scale, causal=True,
                block_table=self.table,
            )  # fmt: skip
        by_request = self.query.view(batch, rows, model.heads, model.head_dim)
        if function is not None:
            return lambda layer: function(
                by_request, *self.caches[layer], cache_seqlens=self.lens, block_table=self.table,
                softmax_scale=self.scale, causal=True,
            ).view_as(self.query)  # fmt: skip
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right

        group = model.heads // model.kv_heads
        need = len(self.caches) * (1 + group) * self.read_bytes
        if need > self.run.free_bytes():
            raise ValueError("dense K and V with repeated heads do not fit memory")
        dense = [
            [x.transpose(1, 2).repeat_interleave(group, 1) for x in self.dense(layer)]
            for layer in range(len(self.caches))
        ]
        query = by_request.transpose(1, 2)
        bias = causal_lower_right(rows, self.keys)

        def sdpa(layer: int) -> Tensor:
            backend = [SDPBackend.FLASH_ATTENTION] if self.run.cuda else [SDPBackend.MATH]
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, *dense[layer], attn_mask=bias, scale=self.scale
                )
            return out.transpose(1, 2).reshape_as(self.query)

        return sdpa

    def xformers(self) -> Callable[[int], Tensor]:
        """Tree attention by a tensor bias over K and V that lie densely.

        Raises:
            ImportError: xformers is not installed.
        """
        from xformers.ops import fmha

        model, batch, rows = self.model, self.batch, self.rows
        group = model.heads // model.kv_heads
        padded = -(-self.keys // 8) * 8  # rows of a bias must be aligned
        bias_bytes = 2 * model.heads * batch * rows * padded
        if len(self.caches) * self.read_bytes + bias_bytes > self.run.free_bytes():
            raise ValueError("dense K and V and their bias do not fit memory")
        visible = torch.ones(rows, padded, dtype=torch.bool)
        visible[:, self.context : self.keys] = self.sees["tree"]
        bias = torch.zeros(rows, padded).masked_fill(~visible, -math.inf)
        bias = bias.to(self.query)[:, : self.keys].expand(batch, model.kv_heads, group, -1, -1)
        query = self.query.view(batch, rows, model.kv_heads, group, model.head_dim)
        dense = [
            [x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in self.dense(layer)]
            for layer in range(len(self.caches))
        ]
        return lambda layer: fmha.memory_efficient_attention_forward(
            query, *dense[layer], attn_bias=bias, scale=self.scale
        ).view_as(self.query)

    def timed(self, make: Callable[[], Callable[[int], Tensor]]) -> float | str:
        """Time of a kernel that may be absent or refuse the shape."""
        try:
            return self.run.us(self.each(make()))
        except ImportError:
            return "not installed"
        except (*REFUSED, torch.OutOfMemoryError) as error:
            return f"not run: {str(error).strip().splitlines()[0][:120]}"


def attention(run: Run) -> Iterator[dict]:
    for name, model in run.models.items():
        for batch in run.batches:
            for context in run.contexts:
                for nodes in run.nodes:
                    shape = {"batch": batch, "context": context, "nodes": nodes}
                    case = Attention(run, model, batch, context, nodes)
                    if not case.fits():
                        gib = case.cache_bytes / 2**30
                        why = f"one layer's cache of {gib:.1f} GiB does not fit memory"
                        yield not_run("tree_attention", name, shape, why)
                        continue
                    case.make()
                    ours = run.kernel() or run.us(case.each(case.ours))
                    flash = case.timed(case.flash)
                    if isinstance(ours, float) and isinstance(flash, float):
                        # Both causal: a kernel that is quick and wrong must not get a row.
                        torch.testing.assert_close(
                            case.ours(0, "chain"), case.flash()(0).view_as(case.out),
                            atol=2e-2, rtol=2e-2,
                        )  # fmt: skip
                    # The twin gathers in float32 and loops over requests: minutes at the far end.
                    affordable = 8 * case.read_bytes * model.heads // model.kv_heads < 8 << 30
                    twin = "not run: too large for the twin"
                    if affordable and 8 * case.read_bytes < run.free_bytes():
                        twin = run.us([lambda case=case: case.twin(0)], graph=False)
                    yield row(
                        "tree_attention", name, shape, ours=ours, twin=twin,
                        floor=case.read_bytes / run.bandwidth * 1e6, flash=flash,
                        xformers=case.timed(case.xformers),
                    )  # fmt: skip
                    del case


WORK = {
    "bandwidth": bandwidth,
    "draft": draft,
    "build_tree": build_tree_stage,
    "tree_attention": attention,
    "walk": walk_stage,
    "move_kv": move_kv,
}


# ---- results -----------------------------------------------------------------------------------


def environment(run: Run) -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in ("vllm", "flash_attn", "xformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["device"] = torch.cuda.get_device_name() if run.cuda else "CPU (rehearsal)"
    versions["kernels"] = cuda_architectures() or "CPU only"
    versions["flash"] = flash_kernel(run.device.type)[0]
    return versions


def load_stage(folder: Path, stage: str) -> dict | None:
    path = folder / f"{stage}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted run must not leave half a stage that counts as done."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "met" if value else "MISSED"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(done: dict[str, dict | None]) -> str:
    lines = ["# Operators on a GPU", ""]
    environments = [stage["environment"] for stage in done.values() if stage]
    if environments:
        lines += [", ".join(f"{k} {v}" for k, v in environments[-1].items()) + ".", ""]
    lines += ["Medians in microseconds per call: `benchmarks/gpu/ops.py`.", ""]
    for name, stage in done.items():
        lines += [f"## {name}", ""]
        if name in TARGETS:
            other, most = TARGETS[name]
            aim = f"{most:g} us" if other == "us" else f"{most:g} x {other}"
            lines += [f"Target: at most {aim}.", ""]
        if stage is None:
            lines += ["not run", ""]
            continue
        if name == "bandwidth":
            lines += [f"{stage['rows'][0]['gb_per_s']:.0f} GB/s", ""]
            continue
        columns = list(dict.fromkeys(key for entry in stage["rows"] for key in entry["us"]))
        header = ["model", "shape", *columns, "value", "target"]
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        for entry in stage["rows"]:
            shape = ", ".join(f"{key} {value}" for key, value in entry["shape"].items())
            times = [cell(entry["us"].get(column, "not run")) for column in columns]
            target = entry["target"]
            cells = [entry["model"], shape, *times, cell(target["value"]), cell(target["met"])]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--nodes", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--again", action="store_true", help="repeat stages that are done")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(arguments)
    if args.rehearse:
        run = Run(torch.device("cpu"), TINY, [1, 2], [40], [8, 16], 2)
    elif torch.cuda.is_available():
        models = {name: MODELS[name] for name in args.models}
        run = Run(
            torch.device("cuda"), models, args.batches, args.contexts, args.nodes, args.replays
        )
    else:
        parser.error("there is no CUDA device; --rehearse runs tiny shapes on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    here = environment(run)
    settings = {
        "models": list(run.models), "batches": run.batches, "contexts": run.contexts,
        "nodes": run.nodes, "replays": run.replays,
    }  # fmt: skip
    # Floors need the bandwidth of this run's device.
    stages = [stage for stage in STAGES if stage in {"bandwidth", *args.stages}]
    for stage in stages:
        done = load_stage(args.out, stage)
        same = done and done["environment"] == here and done["settings"] == settings
        if same and not (args.again and stage in args.stages):
            print(f"{stage}: done already", flush=True)
        else:
            torch.manual_seed(0)
            start, rows = time.monotonic(), []
            for entry in WORK[stage](run):
                rows.append(entry)
                print(f"{stage}: {json.dumps(entry)}", flush=True)
            seconds = time.monotonic() - start
            done = {"environment": here, "settings": settings, "seconds": seconds, "rows": rows}
            write(args.out / f"{stage}.json", json.dumps(done, indent=1) + "\n")
        if stage == "bandwidth":
            run.bandwidth = done["rows"][0]["gb_per_s"] * 1e9
    results = {stage: load_stage(args.out, stage) for stage in STAGES}
    whole = {name: stage or "not run" for name, stage in results.items()}
    write(args.out / "ops_gpu.json", json.dumps(whole, indent=1) + "\n")
    write(args.out / "ops_gpu.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
