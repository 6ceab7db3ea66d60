# SPDX-License-Identifier: Apache-2.0
"""The compiled draft against its twin, ``vllm_redrafter.drafter.beam_search``."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from draft_cases import (
    INF,
    LOGITS,
    NAN,
    assert_same,
    drafter_of_logits,
    identical,
    make_drafter,
    make_inputs,
    random_case,
    smallest_gaps,
)
from torch.nn import functional as F

from vllm_redrafter.drafter.beam_search import Beams, beam_search
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops import draft as draft_module
from vllm_redrafter.ops.draft import CompiledDraft, pack_linear
from vllm_redrafter.ops.library import ISAS, compiled_available, isa, set_isa, why_not

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"


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
        ({"embedding": torch.zeros(0, 16)}, "embedding has no rows"),
        ({"exit_dim": 2**63 - 1}, "is impossible"),
        ({"head_rows": 2**63 - 1, "draft_vocab": None}, "is impossible"),
        ({"num_blocks": 2**63 - 1}, "is impossible"),
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
