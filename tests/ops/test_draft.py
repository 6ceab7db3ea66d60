# SPDX-License-Identifier: Apache-2.0
"""The compiled draft against its twin, ``vllm_redrafter.drafter.beam_search``."""

from __future__ import annotations

import copy
import functools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_redrafter.drafter.beam_search import Beams, beam_search, log_probabilities
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops import draft as draft_module
from vllm_redrafter.ops.draft import CompiledDraft, pack_linear
from vllm_redrafter.ops.library import ISAS, compiled_available, isa, set_isa, why_not

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"

# Scores below this hold a filler's -50000: there a float32 is too coarse to tell near ties apart.
# What is drafted there is tested with exact logits (test_exact_logits).
FILLERS_BELOW = -1000.0


@pytest.fixture(autouse=True)
def _compiled():
    assert compiled_available(), why_not()


@pytest.fixture(params=ISAS)
def each_isa(request):
    """Runs the test once with every variant of the kernels that this processor runs."""
    before = isa()
    try:
        set_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_drafter(
    *, vocab, hidden, exit_dim, blocks, rnn, draft_vocab=None, seed=0, dtype=torch.float32
) -> Drafter:
    generator = torch.Generator().manual_seed(seed)
    config = DrafterConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        exit_dim=exit_dim,
        num_draft_layers=blocks,
        rnn=rnn,
        draft_vocab_size=draft_vocab or vocab,
    )
    drafter = Drafter(config).requires_grad_(False)
    for parameter in drafter.parameters():
        spread = math.sqrt(2.0 / parameter.shape[-1])
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    drafter.to(dtype)
    drafter.embedding = torch.randn(vocab, hidden, generator=generator).to(dtype)
    if draft_vocab:
        drafter.draft_vocab = torch.randperm(vocab, generator=generator)[:draft_vocab]
    return drafter.eval()


def make_inputs(drafter: Drafter, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    context = torch.randn(batch, drafter.config.hidden_size, generator=generator)
    token = torch.randint(drafter.config.vocab_size, (batch,), generator=generator)
    return context.to(drafter.dtype), token


def random_case(seed: int) -> dict:
    rng = random.Random(seed)
    hidden = rng.choice([5, 16, 33, 64])
    vocab = rng.choice([2, 5, 31, 31, 97, 500, 5000])
    return {
        "drafter": {
            "vocab": vocab,
            "hidden": hidden,
            "exit_dim": rng.choice([2 * hidden, 2 * hidden, 24, 7, hidden]),
            "blocks": rng.randrange(4),
            "rnn": rng.random() < 0.5,
            "draft_vocab": rng.choice([None, None, max(1, vocab // 3)]),
            "seed": seed,
        },
        "width": rng.choice([1, 2, 3, 4, 8, 12]),
        "length": rng.randint(1, 5),
        "batch": rng.choice([0, 1, 2, 3, 9]),
        "top_k": rng.choice([0, 0, 1, 5, 50]),
    }


def smallest_gaps(drafter: Drafter, context: Tensor, beams: Beams, top_k: int) -> Tensor:
    """[B]: the least difference between two of the W + 1 best candidates of any depth.

    Where it is small, rounding may decide which candidate is kept or in which order.
    """
    batch, length, width = beams.tokens.shape
    context = context[:, None].expand(-1, width, -1)
    state = drafter.initial_state(batch, width)
    scores = torch.full((batch, width), -50_000.0)
    scores[:, 0] = 0.0
    last = beams.root[:, None].expand(-1, width)
    gaps = torch.full((batch,), math.inf)
    for depth in range(length):
        logits, state = drafter(context, last, state)
        candidates = (scores[:, :, None] + log_probabilities(logits, top_k)).flatten(1)
        best = candidates.topk(min(width + 1, candidates.shape[1]), dim=-1).values
        gap = best[:, :-1] - best[:, 1:]
        gap[best[:, 1:] < FILLERS_BELOW] = math.inf
        gaps = torch.minimum(gaps, F.pad(gap, (0, 1), value=math.inf).amin(1))
        scores, parents = beams.scores[:, depth], beams.parents[:, depth]
        last = beams.tokens[:, depth]
        state = state.gather(1, parents[:, :, None].expand_as(state))
    return gaps


def assert_same(got: Beams, expected: Beams, decided: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.scores, expected.scores, rtol=tolerance, atol=tolerance)
    real = (expected.scores > FILLERS_BELOW) & decided[:, None, None]
    assert torch.equal(got.tokens[real], expected.tokens[real])
    assert torch.equal(got.parents[real], expected.parents[real])
    assert torch.equal(got.root, expected.root)


def identical(a: Beams, b: Beams) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "parents", "scores")
    )


# ---- float32: the twin --------------------------------------------------------------------------


@functools.cache  # the same for every instruction set
def random_draft(seed: int, dtype: torch.dtype) -> tuple:
    """(drafter, context, token, settings, what the twin drafts, its smallest gaps)"""
    case = random_case(seed)
    drafter = make_drafter(**case["drafter"], dtype=dtype)
    twin = drafter if dtype == torch.float32 else rounded_twin(drafter)
    context, token = make_inputs(drafter, case["batch"], seed)
    width, length, top_k = case["width"], case["length"], case["top_k"]
    settings = {"beam_width": width, "draft_length": length, "top_k": top_k}
    if case["batch"] == 0:
        empty = torch.empty(0, length, width, dtype=torch.int64)
        expected = Beams(token, empty, empty, empty.float())
    else:
        expected = beam_search(twin, context, token, **settings)
    gaps = smallest_gaps(twin, context, expected, top_k)
    return drafter, context, token, settings, expected, gaps


@pytest.mark.parametrize("block", range(6))
def test_random_float32(block, each_isa):
    compared = total = 0
    for seed in range(block * 30, block * 30 + 30):
        drafter, context, token, settings, expected, gaps = random_draft(seed, torch.float32)
        got = CompiledDraft(drafter, **settings)(context, token)
        assert_same(got, expected, gaps > 1e-4, 1e-4)
        compared += int((gaps > 1e-4).sum())
        total += len(token)
    assert compared > 0.7 * total  # narrow margins are the exception


@pytest.mark.parametrize("name", sorted(p.parent.name for p in CONFORMANCE.glob("*/oracle.npz")))
def test_vectors_recorded_from_apple(name, each_isa):
    from safetensors.torch import load_file

    folder = CONFORMANCE / name
    oracle = {k: torch.from_numpy(v) for k, v in np.load(folder / "oracle.npz").items() if v.shape}
    drafter = load_drafter(folder)
    embedding = load_file(folder / "embeddings.safetensors")["weight"]
    _, width, length = oracle["beams"].shape
    run = CompiledDraft(
        drafter, embedding, beam_width=width, draft_length=length - 1, take_weights=True
    )
    assert run.top_k == 50  # the default of a checkpoint of Apple's
    beams = run(oracle["prompt_state"], oracle["init_token"])
    torch.testing.assert_close(beams.scores.transpose(0, 1), oracle["scores"], rtol=1e-4, atol=1e-4)
    assert torch.equal(beams.sequences(), oracle["beams"])
    assert torch.equal(beams.parents.transpose(0, 1), oracle["parents"])


def test_wide_layers_and_many_rows(each_isa):
    """More rows than one block of sums, more columns than one step, several chunks of logits."""
    drafter = make_drafter(vocab=1111, hidden=130, exit_dim=300, blocks=1, rnn=True)
    context, token = make_inputs(drafter, 9)
    got = CompiledDraft(drafter, beam_width=12, draft_length=2)(context, token)
    expected = beam_search(drafter, context, token, 12, 2)
    decided = smallest_gaps(drafter, context, expected, 0) > 1e-4
    assert decided.any()
    assert_same(got, expected, decided, 1e-4)


# ---- bfloat16: the same rounding, spelled out ---------------------------------------------------


class RoundedDrafter(Drafter):
    """What the operator documents for bfloat16 weights: inputs of products are rounded, all else is
    float32. Holds the bfloat16 weights as float32."""

    def forward(self, context, tokens, state):
        def linear(layer, x):
            return F.linear(x.bfloat16().float(), layer.weight, layer.bias)

        embedded = self.embed(tokens)
        if self.config.rnn:
            state = F.silu(linear(self.rnn_w, embedded) + linear(self.rnn_u, state))
        else:
            state = embedded + state
        x = torch.cat([context.float(), state], dim=-1)
        if self.config.has_input_proj:
            x = linear(self.input_proj, x)
        *blocks, head = self.lm_head
        for block in blocks:
            x = x + F.silu(linear(block.linear, x))
        return linear(head, x), state


def rounded_twin(drafter: Drafter) -> Drafter:
    twin = copy.deepcopy(drafter).float()
    twin.__class__ = RoundedDrafter
    return twin


@pytest.mark.parametrize("block", range(4))
def test_random_bfloat16(block, each_isa):
    compared = total = 0
    for seed in range(block * 30, block * 30 + 30):
        drafter, context, token, settings, expected, gaps = random_draft(seed, torch.bfloat16)
        got = CompiledDraft(drafter, **settings)(context, token)
        # A sum that differs in its last bit may round to the neighbouring bfloat16.
        decided = gaps > 2e-2
        for row in decided.nonzero().flatten().tolist():
            one = slice(row, row + 1)
            assert_same(
                *(
                    Beams(b.root[one], b.tokens[one], b.parents[one], b.scores[one])
                    for b in (got, expected)
                ),
                decided[one],
                1e-2,
            )
        compared += int(decided.sum())
        total += len(token)
    assert compared > 0.3 * total


def test_bfloat16_is_near_the_twin_in_bfloat16(each_isa):
    drafter = make_drafter(
        vocab=997, hidden=64, exit_dim=64, blocks=2, rnn=True, dtype=torch.bfloat16
    )
    context, token = make_inputs(drafter, 32)
    got = CompiledDraft(drafter, beam_width=4, draft_length=1)(context, token)
    expected = beam_search(drafter, context, token, 4, 1)
    torch.testing.assert_close(got.scores, expected.scores, rtol=0.03, atol=0.03)


# ---- exact logits: ties, fillers, NaN, infinities -----------------------------------------------


def drafter_of_logits(logits: list[float], draft_vocab: list[int] | None = None) -> Drafter:
    """The same logits at every evaluation, exactly: they are the weights of a context of 1."""
    rows = len(logits)
    vocab = max(draft_vocab) + 1 if draft_vocab else rows
    config = DrafterConfig(
        vocab_size=vocab,
        hidden_size=1,
        exit_dim=2,
        num_draft_layers=0,
        rnn=False,
        draft_vocab_size=rows,
    )
    drafter = Drafter(config).requires_grad_(False)
    drafter.lm_head[0].weight.copy_(torch.tensor([[x, 0.0] for x in logits]))
    drafter.embedding = torch.ones(vocab, 1)
    if draft_vocab:
        drafter.draft_vocab = torch.tensor(draft_vocab)
    return drafter


NAN, INF = math.nan, math.inf
LOGITS = {
    "all equal": [0.5] * 40,
    "three levels": [float(i % 3) for i in range(70)],
    "ties with the fifth": [9.0, 8.0, 7.0] + [5.0] * 300 + [1.0, 8.0],
    "minus zero": [-0.0, 0.0, -0.0, 0.0, 1.0, -1.0],
    "one row": [2.0],
    "two rows": [1.0, 2.0],
    "fewer rows than beams": [0.25, -1.0, 0.5],
    "one NaN": [1.0, NAN, 3.0, 2.0] * 10,
    "only NaN": [NAN] * 50,
    "minus infinities": [-INF] * 30 + [1.0, 0.0] + [-INF] * 300,
    "only minus infinities": [-INF] * 33,
    "one infinity": [float(i) for i in range(600)] + [INF] + [0.0] * 10,
    "two infinities": [INF, 1.0, INF, 2.0, NAN, -INF],
    "only infinities": [INF] * 20,
    "largest floats": [3e38, -3e38, 1e9, -1e9, 0.0, 2e38, -1e10, 5.0],
    "kept below the filler": [0.0, -60000.0, -70000.0, -80000.0, -90000.0, -90000.0, -1e6],
    "steep": [-0.1 * i**1.5 for i in range(3000)],
}


@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("width", [1, 2, 4, 12])
@pytest.mark.parametrize("name", LOGITS)
def test_exact_logits(name, width, top_k, each_isa, threads):
    # Two depths: sums of three numbers round differently in different orders.
    drafter = drafter_of_logits(LOGITS[name])
    context, token = torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)
    expected = beam_search(drafter, context, token, width, 2, top_k)
    run = CompiledDraft(drafter, beam_width=width, draft_length=2, top_k=top_k)
    for count in (1, 3):
        threads(count)
        got = run(context, token)
        assert torch.isfinite(got.scores).all()
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-6, atol=1e-6)
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.parents, expected.parents)


def test_rows_are_mapped_through_the_draft_vocabulary():
    ids = [7, 3, 11, 0, 5]
    drafter = drafter_of_logits([1.0, 5.0, 3.0, 5.0, 0.0], ids)
    got = CompiledDraft(drafter, beam_width=4, draft_length=1)(torch.ones(1, 1), torch.tensor([2]))
    assert got.tokens.tolist() == [[[3, 0, 11, 7]]]  # the tie goes to the lower row, not token


@pytest.mark.parametrize("place", ["rnn_w", "rnn_u", "input_proj", "block", "head", "embedding"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_weights_have_a_defined_outcome(place, value, dtype, each_isa):
    drafter = make_drafter(vocab=67, hidden=16, exit_dim=24, blocks=1, rnn=True, dtype=dtype)
    target = {
        "rnn_w": drafter.rnn_w.weight,
        "rnn_u": drafter.rnn_u.weight,
        "input_proj": drafter.input_proj.weight,
        "block": drafter.lm_head[0].linear.weight,
        "head": drafter.lm_head[1].weight,
        "embedding": drafter.embedding,
    }[place]
    target[3, 5] = value
    context, token = make_inputs(drafter, 4)
    token[0] = 3
    got = CompiledDraft(drafter, beam_width=5, draft_length=3)(context, token)
    assert torch.isfinite(got.scores).all()
    assert (got.tokens >= 0).all() and (got.tokens < 67).all()
    assert (got.parents >= 0).all() and (got.parents < 5).all()
    assert (got.scores[:, :, :-1] >= got.scores[:, :, 1:]).all()


# ---- one meaning, however it is computed --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [0, 50])
def test_threads_do_not_change_a_bit(dtype, top_k, each_isa, threads):
    drafter = make_drafter(vocab=5000, hidden=96, exit_dim=96, blocks=2, rnn=True, dtype=dtype)
    context, token = make_inputs(drafter, 3)
    run = CompiledDraft(drafter, beam_width=6, draft_length=3, top_k=top_k)
    threads(1)
    alone = run(context, token)
    for count in (2, 3, 5):
        threads(count)
        assert identical(run(context, token), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batch_does_not_change_a_bit(dtype, each_isa):
    drafter = make_drafter(vocab=700, hidden=48, exit_dim=40, blocks=1, rnn=True, dtype=dtype)
    context, token = make_inputs(drafter, 9)
    run = CompiledDraft(drafter, beam_width=5, draft_length=3)
    together = run(context, token)
    for row in range(9):
        alone = run(context[row : row + 1], token[row : row + 1])
        for name in ("tokens", "parents", "scores"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_and_dtypes_of_the_inputs(dtype):
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=1, rnn=True)
    table = torch.randn(100, 40).to(dtype)  # more rows than the vocabulary, and rows apart
    embedding = table[:, 3:19]
    wide = torch.randn(4, 64).to(dtype)
    token = torch.tensor([5, 96, 0, 7, 1, 1, 2, 2])[::2]
    run = CompiledDraft(drafter, embedding, beam_width=4, draft_length=3)
    twin = copy.deepcopy(drafter)
    twin.embedding = embedding
    for context in (wide[:, 8:24], wide[:, ::4]):
        expected = beam_search(twin, context, token, 4, 3)
        assert_same(run(context, token), expected, torch.ones(4, dtype=torch.bool), 1e-4)


def test_float16_weights_are_widened():
    half = make_drafter(vocab=97, hidden=16, exit_dim=32, blocks=1, rnn=True, dtype=torch.float16)
    context, token = make_inputs(half, 3)
    got = CompiledDraft(half, beam_width=4, draft_length=3)(context, token)
    expected = CompiledDraft(copy.deepcopy(half).float(), beam_width=4, draft_length=3)(
        context, token
    )
    assert identical(got, expected)


# ---- packing and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (32, 6), (33, 7), (64, 64), (100, 3)])
def test_packed_layout(shape, dtype):
    weight = torch.randn(shape[1], shape[0]).t().to(dtype)  # not contiguous
    packed = pack_linear(weight)
    group = packed.shape[-1]
    assert group == (2 if dtype == torch.bfloat16 else 1)
    dense = packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    assert torch.equal(dense[: shape[0], : shape[1]], weight.to(packed.dtype))
    assert (dense[shape[0] :] == 0).all() and (dense[:, shape[1] :] == 0).all()
    assert dense.shape[0] - shape[0] < 32 and dense.shape[1] - shape[1] < group


def test_a_large_layer_in_large_pages():
    weight = torch.randn(4099, 513).bfloat16()
    packed = pack_linear(weight)
    dense = packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    assert torch.equal(dense[:4099, :513], weight)
    assert (dense[4099:] == 0).all() and (dense[:, 513:] == 0).all()


def test_take_weights_frees_the_originals():
    drafter = make_drafter(vocab=64, hidden=16, exit_dim=24, blocks=2, rnn=True)
    kept = copy.deepcopy(drafter)
    context, token = make_inputs(drafter, 2)
    run = CompiledDraft(drafter, beam_width=3, draft_length=2, take_weights=True)
    assert sum(p.numel() for n, p in drafter.named_parameters() if n.endswith("weight")) == 0
    assert identical(
        run(context, token), CompiledDraft(kept, beam_width=3, draft_length=2)(context, token)
    )
    exact = sum(p.nbytes for p in kept.parameters())
    assert exact <= run.packed_bytes() <= 2 * exact  # 24 columns are padded to 32


def test_without_compiled_operators_the_twin_answers(monkeypatch):
    monkeypatch.setattr(draft_module, "compiled_available", lambda: False)
    drafter = make_drafter(vocab=64, hidden=16, exit_dim=24, blocks=2, rnn=True)
    embedding, drafter.embedding = drafter.embedding, None
    run = CompiledDraft(drafter, embedding, beam_width=3, draft_length=2, take_weights=True)
    assert not run.compiled and run.packed_bytes() == 0
    context, token = make_inputs(drafter, 2)
    got = run(context, token)
    assert drafter.embedding is None
    drafter.embedding = embedding
    assert identical(got, beam_search(drafter, context, token, 3, 2))


# ---- the operator itself ------------------------------------------------------------------------


def operator_arguments(batch=2, width=3, length=2):
    drafter = make_drafter(vocab=64, hidden=16, exit_dim=24, blocks=2, rnn=True, draft_vocab=40)
    run = CompiledDraft(drafter, beam_width=width, draft_length=length)
    context, token = make_inputs(drafter, batch)
    shape = (batch, length, width)
    return {
        "tokens": torch.full(shape, -7),
        "parents": torch.full(shape, -7),
        "scores": torch.full(shape, math.nan),
        "context": context,
        "token": token,
        "embedding": drafter.embedding,
        "draft_vocab": drafter.draft_vocab,
        "layers": run._layers,
        "head_rows": 40,
        "exit_dim": 24,
        "num_blocks": 2,
        "rnn": True,
        "top_k": 0,
    }


def test_opcheck():
    torch.library.opcheck(torch.ops.redrafter.draft.default, (), operator_arguments())


def test_every_output_is_written():
    args = operator_arguments(batch=5, width=7, length=4)
    torch.ops.redrafter.draft(**args)
    assert (args["tokens"] >= 0).all() and (args["parents"] >= 0).all()
    assert torch.isfinite(args["scores"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, 15)}, r"context must be \[2, 16\]"),
        ({"context": torch.zeros(2, 32)[:, ::2]}, "rows of context must be contiguous"),
        ({"context": torch.zeros(2, 16, dtype=torch.float64)}, "context must be float32"),
        ({"token": torch.zeros(3, dtype=torch.int64)}, r"token must be \[2\]"),
        ({"token": torch.tensor([1, 64])}, "no row among the 64"),
        ({"token": torch.tensor([-1, 0])}, "no row among the 64"),
        ({"token": torch.zeros(2, dtype=torch.int32)}, "token must be int64"),
        ({"draft_vocab": torch.full((40,), 64)}, "no row among the 64"),
        ({"draft_vocab": torch.zeros(39, dtype=torch.int64)}, "vector of 40 ids"),
        ({"num_blocks": 1}, "packed layer|expected"),
        ({"num_blocks": 3}, "missing|packed layer"),
        ({"exit_dim": 64}, "packed layer"),
        ({"rnn": False}, "packed layer|float32 vector"),
        ({"head_rows": 100, "draft_vocab": None}, "packed layer"),
        ({"layers": []}, "no layers"),
        ({"top_k": -1}, "top_k -1"),
        ({"scores": torch.zeros(2, 2, 2)}, "one shape"),
        ({"tokens": torch.zeros(2, 2, 6, dtype=torch.int64)[:, :, ::2]}, "contiguous"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.redrafter.draft(**{**operator_arguments(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam_width": 0}, "beam_width 0"),
        ({"draft_length": 0}, "draft_length 0"),
        ({"top_k": -1}, "top_k -1"),
        ({"embedding": torch.zeros(64, 15)}, "hidden_size is 16"),
        ({"embedding": torch.zeros(63, 16)}, "63 rows"),
    ],
)
def test_bad_settings(change, message):
    drafter = make_drafter(vocab=64, hidden=16, exit_dim=24, blocks=1, rnn=True)
    with pytest.raises(ValueError, match=message):
        CompiledDraft(drafter, **{"beam_width": 2, "draft_length": 2, **change})


def test_an_embedding_is_needed():
    drafter = make_drafter(vocab=64, hidden=16, exit_dim=24, blocks=1, rnn=True)
    drafter.embedding = None
    with pytest.raises(ValueError, match="no embedding"):
        CompiledDraft(drafter, beam_width=2, draft_length=2)
