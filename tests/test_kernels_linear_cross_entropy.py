from __future__ import annotations

import pytest
import torch

from moeft.kernels import linear_cross_entropy
from moeft.kernels.linear_cross_entropy import reference


def case(dtype=torch.float64, rows=23, hidden=16, vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[[0, 5, 6]] = -100
    return h, w, labels


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1024])
def test_loss_and_gradients_equal_the_reference(softcap, chunk_rows):
    h, w, labels = case(torch.float32)
    ours = linear_cross_entropy(h, w, labels, softcap, chunk_rows)
    theirs = reference.linear_cross_entropy(h, w, labels, softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours * 0.3, (h, w)), torch.autograd.grad(theirs * 0.3, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_get_zero_gradient():
    h, w, labels = case(torch.float32)
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, w, labels), h)
    assert (grad[[0, 5, 6]] == 0).all()
    assert (grad[1:5] != 0).any(-1).all()


def test_no_row_that_counts_gives_zero():
    h, w, labels = case(torch.float32)
    loss = linear_cross_entropy(h, w, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert h.grad.abs().max() == 0


def test_logits_are_never_larger_than_a_chunk():
    h, w, labels = case(torch.float32, rows=64, vocabulary=1000)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(h, w.detach(), labels, 30.0, chunk_rows=8)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 8 * 1000 * 4 * 4


def test_labels_of_another_shape_are_refused():
    h, w, labels = case(torch.float32)
    with pytest.raises(ValueError, match=r"labels has shape \(22,\), expected \(23,\)"):
        linear_cross_entropy(h, w, labels[1:])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1 / 70_000), (torch.float16, 65_536.0)])
def test_scale_of_the_loss_is_not_rounded_to_16_bits(dtype, scale):
    h, w, labels = case(dtype)
    (unit,) = torch.autograd.grad(linear_cross_entropy(h, w.detach(), labels), h)
    (scaled,) = torch.autograd.grad(linear_cross_entropy(h, w.detach(), labels) * scale, h)
    assert torch.equal(scaled, (unit * torch.tensor(scale)).to(dtype))
