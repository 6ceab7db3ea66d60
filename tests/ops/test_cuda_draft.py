# SPDX-License-Identifier: Apache-2.0
"""The draft on CUDA, emulated or on a GPU, against its twin on the CPU.

Emulated, the products are torch's own for CPU tensors; everything between them is the CUDA code.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from draft_cases import (
    LOGITS,
    assert_same,
    drafter_of_logits,
    identical,
    make_drafter,
    make_inputs,
    random_case,
    smallest_gaps,
)
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams, beam_search
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops.draft import CompiledDraft, plain_layers


def arguments(
    drafter: Drafter, device: torch.device, context: Tensor, token: Tensor, width: int, length: int,
    top_k: int = 0,
) -> dict[str, object]:  # fmt: skip
    """The operator's, with poisoned outputs."""
    shape, config = (token.shape[0], length, width), drafter.config
    vocab = drafter.draft_vocab
    return {
        "tokens": torch.full(shape, -7, device=device),
        "parents": torch.full(shape, -7, device=device),
        "scores": torch.full(shape, math.nan, device=device),
        "context": context.to(device),
        "token": token.to(device),
        "embedding": drafter.embedding.to(device),
        "draft_vocab": None if vocab is None else vocab.to(device),
        "layers": [tensor.to(device) for tensor in plain_layers(drafter)],
        "head_rows": config.draft_vocab_size,
        "exit_dim": config.exit_dim,
        "num_blocks": config.num_draft_layers,
        "rnn": bool(config.rnn),
        "top_k": top_k,
    }


def draft(operators, device, drafter, context, token, width, length, top_k=0) -> Beams:
    args = arguments(drafter, device, context, token, width, length, top_k)
    operators.draft(**args)
    return Beams(token, args["tokens"].cpu(), args["parents"].cpu(), args["scores"].cpu())


def compare(device_ops, drafter, batch, width, length, top_k=0, seed=0) -> tuple[int, int]:
    """(requests whose integers were compared, requests)"""
    context, token = make_inputs(drafter, batch, seed)
    got = draft(*device_ops, drafter, context, token, width, length, top_k)
    if batch == 0:
        assert got.tokens.shape == (0, length, width)
        return 0, 0
    expected = beam_search(drafter, context, token, width, length, top_k)
    decided = smallest_gaps(drafter, context, expected, top_k) > 1e-4
    assert_same(got, expected, decided, 1e-4)
    return int(decided.sum()), batch


@pytest.mark.parametrize("block", range(3))
def test_random_float32(device_ops, block):
    compared = total = 0
    for seed in range(block * 6, block * 6 + 6):
        case = random_case(seed)
        drafter = make_drafter(**case["drafter"])
        batch, width = min(case["batch"], 3), min(case["width"], 5)
        length = min(case["length"], 3)
        found = compare(device_ops, drafter, batch, width, length, case["top_k"], seed)
        compared, total = compared + found[0], total + found[1]
    assert compared > 0.7 * total  # narrow margins are the exception


SHAPES = {
    "everything": {"exit_dim": 24, "blocks": 2, "rnn": True},
    "no cell": {"exit_dim": 24, "blocks": 2, "rnn": False},
    "no input_proj": {"exit_dim": 32, "blocks": 2, "rnn": True},
    "no input_proj, one block, no cell": {"exit_dim": 32, "blocks": 1, "rnn": False},
    "no blocks": {"exit_dim": 24, "blocks": 0, "rnn": True},
    "only a cell": {"exit_dim": 32, "blocks": 0, "rnn": True},
    "only a head": {"exit_dim": 32, "blocks": 0, "rnn": False},
    "draft vocabulary": {"exit_dim": 24, "blocks": 1, "rnn": True, "draft_vocab": 40},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_drafter(device_ops, shape):
    drafter = make_drafter(vocab=97, hidden=16, **SHAPES[shape])
    compared = 0
    for width, length, top_k in ((1, 4, 0), (4, 4, 0), (4, 1, 0), (3, 3, 5)):
        compared += compare(device_ops, drafter, 2, width, length, top_k)[0]
    assert compared > 4


def test_no_request(device_ops):
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=1, rnn=True)
    assert compare(device_ops, drafter, 0, 3, 2) == (0, 0)


def test_wide_layers_and_several_chunks_of_logits(device_ops):
    """More columns than a block has threads."""
    drafter = make_drafter(vocab=1111, hidden=300, exit_dim=600, blocks=1, rnn=True)
    assert compare(device_ops, drafter, 2, 3, 2)[0] > 0
    drafter = make_drafter(vocab=130, hidden=300, exit_dim=270, blocks=1, rnn=True)
    assert compare(device_ops, drafter, 2, 3, 2)[0] > 0


# Interpreted, these take long; other inputs, and beam_step's own, stand for them.
@pytest.mark.parametrize(
    "device_ops", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("setting", [(4, 5), (12, 50), (12, 0)])
@pytest.mark.parametrize("name", sorted(set(LOGITS) - {"steep"}))
def test_exact_logits(device_ops, name, setting):
    """Ties, fillers, NaN, infinities, and more beams than tokens: integers are the twin's."""
    width, top_k = setting
    drafter = drafter_of_logits(LOGITS[name])
    context, token = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    expected = beam_search(drafter, context, token, width, 2, top_k)
    got = draft(*device_ops, drafter, context, token, width, 2, top_k)
    assert torch.isfinite(got.scores).all()
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-6, atol=2e-6)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.parents, expected.parents)


def test_other_weights_are_noticed(device_ops):
    """Negative control: the halves of input_proj in the other order."""
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=1, rnn=True)
    context, token = make_inputs(drafter, 2)
    args = arguments(drafter, device_ops[1], context, token, 3, 2)
    layers = args["layers"]
    layers[3], layers[4] = layers[4], layers[3]
    device_ops[0].draft(**args)
    expected = beam_search(drafter, context, token, 3, 2)
    assert not torch.equal(args["tokens"].cpu(), expected.tokens)


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("exit_dim", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_twin(device_ops, dtype, exit_dim, rnn):
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=exit_dim, blocks=2, rnn=rnn, dtype=dtype)
    context, token = make_inputs(drafter, 6)
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    expected = beam_search(drafter, context, token, 4, 1)
    got = draft(*device_ops, drafter, context, token, 4, 1)
    torch.testing.assert_close(got.scores, expected.scores, rtol=tolerance, atol=tolerance)
    # One beam and deeper, the score of the path that was drafted.
    got = draft(*device_ops, drafter, context, token, 1, 3)
    widened = copy.deepcopy(drafter).float()
    widened.embedding = drafter.embedding.float()
    state, last, score = widened.initial_state(6), token, torch.zeros(6)
    for depth in range(3):
        with torch.inference_mode():
            logits, state = widened(context.float(), last, state)
        last = got.tokens[:, depth, 0]
        score = score + torch.log_softmax(logits, -1).gather(1, last[:, None])[:, 0]
        torch.testing.assert_close(got.scores[:, depth, 0], score, rtol=0.05, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_and_dtypes_of_the_inputs(device_ops, dtype):
    operators, device = device_ops
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=1, rnn=True)
    # More rows than the vocabulary, rows and tokens apart.
    table = torch.randn(100, 40).to(dtype)
    wide = torch.randn(4, 64).to(dtype)
    tokens = torch.tensor([5, 96, 0, 7, 1, 1, 2, 2])
    drafter.embedding = table[:, 3:19]
    expected = beam_search(drafter, wide[:, 8:24], tokens[::2], 4, 2)
    args = arguments(drafter, device, wide[:, 8:24], tokens[::2], 4, 2)
    args["context"] = wide.to(device)[:, 8:24]
    args["token"] = tokens.to(device)[::2]
    args["embedding"] = table.to(device)[:, 3:19]
    operators.draft(**args)
    got = Beams(tokens[::2], *(args[name].cpu() for name in ("tokens", "parents", "scores")))
    decided = smallest_gaps(drafter, wide[:, 8:24], expected, 0) > 1e-4
    assert decided.any()
    assert_same(got, expected, decided, 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_numbers_have_a_defined_outcome(device_ops, value, dtype):
    drafter = make_drafter(vocab=67, hidden=16, exit_dim=24, blocks=1, rnn=True, dtype=dtype)
    context, token = make_inputs(drafter, 3)
    context[0, 3] = value
    drafter.embedding[int(token[1]), 5] = value
    got = draft(*device_ops, drafter, context, token, 5, 3)
    assert torch.isfinite(got.scores).all()
    assert (got.tokens >= 0).all() and (got.tokens < 67).all()
    assert (got.parents >= 0).all() and (got.parents < 5).all()
    assert (got.scores[:, :, :-1] >= got.scores[:, :, 1:]).all()
    # A request's numbers stay its own.
    clean = draft(*device_ops, drafter, context[2:], token[2:], 5, 3)
    if dtype == torch.float32 and token[1] != token[2] and device_ops[1].type == "cpu":
        torch.testing.assert_close(got.scores[2:], clean.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rnn", [True, False])
def test_a_token_without_an_embedding_is_zeros(device_ops, rnn):
    drafter = make_drafter(vocab=67, hidden=16, exit_dim=24, blocks=1, rnn=rnn)
    context, _ = make_inputs(drafter, 3)
    got = draft(*device_ops, drafter, context, torch.tensor([-1, 67, 1 << 40]), 3, 2)
    drafter.embedding[9] = 0.0
    expected = draft(*device_ops, drafter, context, torch.tensor([9, 9, 9]), 3, 2)
    without_nine = ~(expected.tokens == 9).flatten(1).any(1)  # its row was changed
    assert without_nine.any()
    for name in ("tokens", "parents", "scores"):
        assert torch.equal(getattr(got, name)[without_nine], getattr(expected, name)[without_nine])
    # And through the draft vocabulary: the ids are written as they are.
    drafter.draft_vocab = torch.arange(67) + 1000
    got = draft(*device_ops, drafter, context, torch.tensor([1, 2, 3]), 3, 2)
    assert (got.tokens >= 1000).all() and torch.isfinite(got.scores).all()


def test_nothing_unwritten_is_read(device_ops):
    """torch fills new memory with NaN in its deterministic mode; the result is bit for bit that
    without, so no scratch is read before it is written."""
    for shape in ("everything", "only a head", "only a cell", "no cell"):
        drafter = make_drafter(vocab=97, hidden=16, **SHAPES[shape])
        context, token = make_inputs(drafter, 2)
        plain = draft(*device_ops, drafter, context, token, 4, 3)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(4).isnan().all()
            poisoned = draft(*device_ops, drafter, context, token, 4, 3)
        finally:
            torch.use_deterministic_algorithms(False)
        assert identical(plain, poisoned)
        assert (plain.tokens >= 0).all() and (plain.parents >= 0).all()
        assert torch.isfinite(plain.scores).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": (2, 15)}, r"context must be \[2, 16\]"),
        ({"token": (3,)}, r"token must be|Long"),
        ({"num_blocks": 1}, "the head must be|expected"),
        ({"num_blocks": 3}, "a block must be|missing"),
        ({"exit_dim": 64}, "the context half must be"),
        ({"rnn": False}, "the context half must be"),
        ({"head_rows": 100, "draft_vocab": None}, "the head must be"),
        ({"layers": []}, "no layers"),
        ({"top_k": -1}, "top_k -1"),
        ({"scores": (2, 2, 2)}, "one shape"),
    ],
)
def test_refusals(device_ops, change, message):
    operators, device = device_ops
    drafter = make_drafter(vocab=64, hidden=16, exit_dim=24, blocks=2, rnn=True, draft_vocab=40)
    args = arguments(drafter, device, *make_inputs(drafter, 2), 3, 2)
    for name, value in change.items():
        shaped = isinstance(value, tuple)
        args[name] = torch.zeros(value, device=device) if shaped else value
    with pytest.raises(RuntimeError, match=message):
        operators.draft(**args)


def test_limits_are_named(device_ops):
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=0, rnn=True)
    context, token = make_inputs(drafter, 1)
    for width, top_k in ((65, 0), (2, 65)):
        with pytest.raises(RuntimeError, match="more than the CUDA kernels keep, 64"):
            draft(*device_ops, drafter, context, token, width, 1, top_k)
    # A top k beyond the vocabulary is all of it.
    small = make_drafter(vocab=31, hidden=16, exit_dim=24, blocks=0, rnn=True)
    assert compare(device_ops, small, 2, 2, 2, top_k=1000)[1] == 2


def test_layers_are_views_of_the_weights():
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=1, rnn=True)
    rnn_w, _, _, context_half, state_half, *_, head = plain_layers(drafter)
    assert rnn_w.data_ptr() == drafter.rnn_w.weight.data_ptr()
    assert head.data_ptr() == drafter.lm_head[-1].weight.data_ptr()
    assert torch.equal(torch.cat([context_half, state_half], 1), drafter.input_proj.weight)
    assert context_half.data_ptr() == drafter.input_proj.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_in_a_cuda_graph(dtype):
    drafter = make_drafter(vocab=997, hidden=64, exit_dim=96, blocks=2, rnn=True, dtype=dtype)
    first, second = make_inputs(drafter, 3), make_inputs(drafter, 3, seed=1)
    args = arguments(drafter, torch.device("cuda"), *first, 4, 3)
    names = ("tokens", "parents", "scores")
    expected = [draft(torch.ops.redrafter, torch.device("cuda"), drafter, *inputs, 4, 3)
                for inputs in (first, second)]  # fmt: skip
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.redrafter.draft(**args)  # cuBLAS allocates at its first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.redrafter.draft(**args)
    for (context, token), wanted in zip((second, first), reversed(expected), strict=True):
        args["context"].copy_(context)
        args["token"].copy_(token)
        for name in names:
            args[name].fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        assert identical(Beams(token, *(args[name].cpu() for name in names)), wanted)


@pytest.mark.gpu
def test_a_drafter_on_cuda_is_compiled():
    drafter = make_drafter(vocab=97, hidden=16, exit_dim=24, blocks=1, rnn=True, draft_vocab=40)
    context, token = make_inputs(drafter, 3)
    expected = beam_search(drafter, context, token, 4, 3)
    decided = smallest_gaps(drafter, context, expected, 0) > 1e-4
    there = copy.deepcopy(drafter).cuda()
    run = CompiledDraft(there, beam_width=4, draft_length=3, take_weights=True)
    assert run.compiled and there.rnn_w.weight.numel() > 0
    got = run(context.cuda(), token.cuda())
    assert got.tokens.is_cuda
    names = ("tokens", "parents", "scores")
    assert_same(Beams(token, *(getattr(got, n).cpu() for n in names)), expected, decided, 1e-4)
    assert not CompiledDraft(there, beam_width=65, draft_length=3).compiled  # the twin's
