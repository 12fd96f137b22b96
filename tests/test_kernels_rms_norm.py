"""The norm and its gradient against PyTorch's own."""

import pytest
import torch
from torch.nn import functional

from moeft.kernels.rms_norm import rms_norm

EPS = 1e-6


def norm_and_gradient(function, x, weight, grad):
    x = x.detach().requires_grad_()
    out = function(x, weight)
    out.backward(grad)
    return out.detach(), x.grad


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 5, 37), (300, 256)])
@pytest.mark.parametrize("scaled", [False, True])
def test_forward_and_gradient_equal_pytorch_in_float64(shape, scaled):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator)
    weight = 1 + torch.rand(shape[-1], generator=generator) if scaled else None
    ours = norm_and_gradient(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)
    exact = norm_and_gradient(
        lambda x, w: functional.rms_norm(x, shape[-1:], w, EPS),
        x.double(),
        None if weight is None else weight.double(),
        grad.double(),
    )
    # The gradient is a difference: its error is one of the terms, which are as large as their larger one.
    term = grad / x.square().mean(-1, keepdim=True).sqrt() * (1 if weight is None else weight)
    for found, expected, scale in zip(ours, exact, (exact[0], term), strict=True):
        # Some roundings of a product, and sums in sixteen parts: below sixteen units in the last place of the scale.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=16 * 2**-24 * float(scale.abs().max()))


def test_strides_of_rows_and_gradient_do_not_matter():
    x, grad = torch.randn(2, 8, 6, 4).transpose(2, 3)
    weight = torch.rand(6)
    ours = norm_and_gradient(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)
    theirs = norm_and_gradient(lambda x, w: rms_norm(x, w, EPS), x.contiguous(), weight, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_any_number_of_threads_gives_the_same_bits():
    x, grad = torch.randn(2, 700, 256)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(norm_and_gradient(lambda x, w: rms_norm(x, w, EPS), x, torch.ones(256), grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_no_rows_go_through_pytorch(dtype):
    x = torch.randn(4, 8).to(dtype)
    torch.testing.assert_close(rms_norm(x, None, EPS), functional.rms_norm(x, (8,), eps=EPS))
    assert rms_norm(torch.empty(0, 8), None, EPS).shape == (0, 8)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(7), "expected torch.float32 of \\(8,\\)"),
        (torch.ones(8, dtype=torch.float64), "weight is torch.float64"),
        (torch.ones(8, requires_grad=True), "freeze it"),
    ],
)
def test_weight_that_does_not_fit_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(2, 8), weight, EPS)
