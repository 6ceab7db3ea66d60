# SPDX-License-Identifier: Apache-2.0
"""The chunked loss against plain PyTorch, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vllm_redrafter.training import losses
from vllm_redrafter.training.losses import linear_cross_entropy

N, WIDTH, VOCAB, TEACHERS = 11, 5, 7, 4


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    teacher = torch.rand(TEACHERS, VOCAB, generator=generator, dtype=torch.float64)
    # Less than all of the distribution, as when a part lies outside the head's rows.
    teacher = 0.9 * teacher / teacher.sum(1, keepdim=True)
    rows = torch.randint(TEACHERS, (N,), generator=generator)
    labels = torch.randint(VOCAB, (N,), generator=generator)
    scale = torch.rand(N, generator=generator, dtype=torch.float64)
    scale[[2, 7]] = 0
    return x, weight, teacher, rows, labels, scale


def plain(x, weight, teacher, rows, labels, scale):
    logits = x @ weight.T
    if teacher is None:
        per_row = F.cross_entropy(logits, labels, reduction="none")
    else:
        per_row = -(teacher[rows] * logits.log_softmax(-1)).sum(-1)
    return (per_row * scale).sum(), per_row, logits.argmax(-1)


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("chunk", [1, 4, 11, None])
def test_values_and_gradients_are_plain_pytorchs(case, soft, chunk):
    x, weight, teacher, rows, labels, scale = case
    teacher = teacher if soft else None
    expected, expected_rows, expected_best = plain(x, weight, teacher, rows, labels, scale)
    wanted = torch.autograd.grad(3 * expected, (x, weight))
    loss, per_row, best = linear_cross_entropy(
        x, weight, rows if soft else labels, scale, teacher, chunk
    )
    got = torch.autograd.grad(3 * loss, (x, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(per_row, expected_rows.detach())
    assert torch.equal(best, expected_best)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_it_is_the_same(case):
    x, weight, teacher, rows, _, scale = case
    results = []
    for compiled in (False, True):
        loss, per_row, best = linear_cross_entropy(
            x, weight, rows, scale, teacher, 4, compiled=compiled
        )
        results.append((loss, per_row, best, *torch.autograd.grad(loss, (x, weight))))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("said", ["no compiler\nhere", ""])
def test_what_keeps_it_from_being_compiled(monkeypatch, said):
    def fail(*args):
        raise RuntimeError(said)

    monkeypatch.setattr(losses, "_compiled_chunk_loss", lambda: fail)
    reason = losses.why_not_compiled(torch.device("cpu"))
    assert reason == ("no compiler" if said else "RuntimeError")
    monkeypatch.setattr(losses, "_compiled_chunk_loss", lambda: losses._chunk_loss)
    assert losses.why_not_compiled(torch.device("cpu")) is None


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_gradcheck(case, soft):
    x, weight, teacher, rows, labels, scale = case

    def loss(x, weight):
        return linear_cross_entropy(
            x, weight, rows if soft else labels, scale, teacher if soft else None, 3
        )[0]

    assert torch.autograd.gradcheck(loss, (x, weight))


def test_a_frozen_head_gets_no_gradient_and_labels_outside_count_nothing(case):
    x, weight, _, _, labels, scale = case
    labels[2] = -1  # its scale is 0
    loss, _, _ = linear_cross_entropy(x, weight.detach(), labels, scale)
    loss.backward()
    assert weight.grad is None and x.grad is not None
    assert not x.grad[2].any() and x.grad.isfinite().all()


def test_without_gradients_only_values(case):
    x, weight, teacher, rows, _, scale = case
    with torch.no_grad():
        loss, _, _ = linear_cross_entropy(x, weight, rows, scale, teacher)
    assert not loss.requires_grad


def test_no_logits_of_all_rows_are_kept():
    x = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    loss, _, _ = linear_cross_entropy(x, weight, torch.zeros(64, dtype=torch.int64),
                                      torch.ones(64), chunk=8)  # fmt: skip
    assert max(t.numel() for t in loss.grad_fn.saved_tensors) == weight.numel()
