"""The loss head against its definition: full logits, log-softmax, autograd."""

from __future__ import annotations

import pytest
import torch

from moeft.kernels import linear_cross_entropy, linear_log_probs
from moeft.kernels.linear_cross_entropy import function, reference

MASKED = [0, 5, 6]


def case(dtype=torch.float64, rows=23, hidden=16, vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[MASKED] = -100
    return h, w, labels


def coefficients(rows=23):
    """What a loss of preference pairs multiplies log-probabilities with: known late, of both signs."""
    return torch.linspace(-1.5, 2.0, rows)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_log_probs_and_gradients_equal_the_reference(softcap, chunk_rows, monkeypatch):
    monkeypatch.setattr(function, "TILE_ELEMENTS", 16 * 9)  # several tiles, the last one smaller
    h, w, labels = case(torch.float32)
    ours = linear_log_probs(h, w, labels, softcap, chunk_rows)
    theirs = reference.linear_log_probs(h, w, labels, softcap)
    # Logits of 16 products are a few units large: their rounding, 16 half ulps, is 2e-6 of that.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=5e-6)
    assert (ours[MASKED] == 0).all()
    weighted = [(values * coefficients()).sum() for values in (ours, theirs)]
    for a, b in zip(*(torch.autograd.grad(value, (h, w)) for value in weighted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_is_minus_the_sum_of_log_probs(softcap):
    h, w, labels = case(torch.float32)
    loss = linear_cross_entropy(h, w, labels, softcap, 7)
    expected = reference.linear_cross_entropy(h, w, labels, softcap)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(loss * 0.3, (h, w)), torch.autograd.grad(expected * 0.3, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_finite_differences(softcap):
    h, w, labels = case(torch.float64, rows=9, hidden=4, vocabulary=7)
    assert torch.autograd.gradcheck(lambda h, w: linear_log_probs(h, w, labels, softcap, 4), (h, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_log_probs_are_within_the_rounding_of_16_bit_logits(dtype):
    h, w, labels = case(dtype, hidden=64, vocabulary=300)
    exact_h, exact_w = (tensor.detach().double().requires_grad_() for tensor in (h, w))
    exact = reference.linear_log_probs(exact_h, exact_w, labels)
    ours = linear_log_probs(h, w, labels)
    # A logit and the log of the normaliser are off by half an ulp each when logits are rounded to 16 bits, and less
    # when they are not.
    ulp = torch.finfo(dtype).eps * (exact_h @ exact_w.mT).abs().max().item()
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= ulp
    gradients = torch.autograd.grad((ours * coefficients()).sum(), (h, w))
    expected = torch.autograd.grad((exact * coefficients()).sum(), (exact_h, exact_w))
    for gradient, truth in zip(gradients, expected, strict=True):
        # The unit gradient and its product are rounded once each; one rounding is eps / 3.5 in relative RMS.
        assert (gradient.double() - truth).norm() <= 2 * torch.finfo(dtype).eps / 3.5 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_core_and_pytorch_agree_and_threads_do_not_matter(dtype, monkeypatch):
    h, w, labels = case(dtype, rows=300, vocabulary=1000)
    before = torch.get_num_threads()

    def run(threads):
        torch.set_num_threads(threads)
        log_probs = linear_log_probs(h, w.detach(), labels, 30.0, 64)
        return log_probs.detach(), *torch.autograd.grad(log_probs.sum(), h)

    try:
        one, two = run(1), run(2)
        monkeypatch.setenv("MOEFT_KERNELS", "pytorch")
        pytorch = run(1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    torch.testing.assert_close(one[0], pytorch[0], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(one[1], pytorch[1], rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


def test_rows_that_do_not_count_get_zero_gradient():
    h, w, labels = case(torch.float32)
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, w, labels), h)
    assert (grad[MASKED] == 0).all()
    assert (grad[1:5] != 0).any(-1).all()


@pytest.mark.parametrize("rows", [0, 23], ids=["no rows", "all masked"])
def test_no_row_that_counts_gives_zero(rows):
    h, w, labels = case(torch.float32)
    h = h[:rows].detach().requires_grad_()
    masked = torch.full_like(labels[:rows], -100)
    assert torch.equal(linear_log_probs(h, w, masked), torch.zeros(rows))
    loss = linear_cross_entropy(h, w, masked)
    loss.backward()
    assert loss == 0
    assert (h.grad == 0).all()
    assert w.grad.abs().max() == 0


def test_leading_axes_are_kept():
    h, w, labels = case(torch.float32, rows=24)
    flat = linear_log_probs(h, w, labels)
    assert torch.equal(linear_log_probs(h.view(2, 12, 16), w, labels.view(2, 12)), flat.view(2, 12))


def test_nan_reaches_its_own_row_and_the_loss():
    h, w, labels = case(torch.float32)
    poisoned = h.detach().clone()
    poisoned[3, 2] = float("nan")
    log_probs = linear_log_probs(poisoned, w, labels)
    assert log_probs.isnan().nonzero().tolist() == [[3]]
    assert linear_cross_entropy(poisoned, w, labels).isnan()


def test_frozen_head_gets_no_gradient_and_is_not_kept():
    h, w, labels = case(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss = linear_cross_entropy(h, w.detach(), labels)
    loss.backward()
    assert w.grad is None
    assert w.shape not in saved


def test_gradient_is_formed_in_the_forward_only_when_it_is_needed(monkeypatch):
    h, w, labels = case(torch.float32)
    products = []
    monkeypatch.setattr(function, "_times_head", lambda *args: products.append(args) or args[0] @ w)
    with torch.no_grad():
        linear_log_probs(h, w, labels)
    linear_log_probs(h.detach(), w, labels)
    assert products == []
    linear_log_probs(h, w, labels).sum().backward()
    assert len(products) == 1


def peak_bytes(run) -> int:
    """Most bytes that torch's CPU allocator held at once above the start of ``run``, by its own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("kernels", "chunks"), [("auto", 1), ("pytorch", 2)])
def test_peak_memory_with_262144_classes_is_one_or_two_chunks_of_logits(kernels, chunks, monkeypatch):
    monkeypatch.setenv("MOEFT_KERNELS", kernels)
    rows, hidden, vocabulary, chunk_rows = 512, 64, 262_144, 32
    h = torch.randn(rows, hidden).bfloat16().requires_grad_()
    w = torch.randn(vocabulary, hidden).bfloat16()
    labels = torch.arange(rows) * 511
    labels[torch.arange(rows) % 4 != 0] = -100
    chunk = chunk_rows * vocabulary * 4
    peak = peak_bytes(lambda: linear_cross_entropy(h, w, labels, 30.0, chunk_rows).backward())
    # Besides the chunks: a tile of the head in float32, and of each row hidden states, gradients and scalars.
    small = function.TILE_ELEMENTS * 4 + rows * (4 * hidden * 4 + 64)
    assert chunks * chunk <= peak <= chunks * chunk + small
    assert peak < rows * vocabulary * 4 / 5  # less than a fifth of what full logits take, once


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(22, dtype=torch.int64)}, ValueError, r"labels has shape \(22,\), expected \(23,\)"),
        ({"labels": torch.zeros(23, dtype=torch.int32)}, TypeError, r"labels is torch.int32.*labels.long\(\)"),
        ({"labels": torch.full((23,), 50)}, ValueError, "label 50 of row 0 is out of range, expected 0 to 49"),
        ({"labels": torch.full((23,), -1)}, ValueError, "label -1 of row 0 is out of range"),
        (
            {"head_weight": torch.zeros(50, 15)},
            ValueError,
            r"head_weight has shape \(50, 15\), expected \(vocabulary, 16",
        ),
        ({"head_weight": torch.zeros(50, 16, dtype=torch.uint8)}, TypeError, "head_weight is torch.uint8.*packed"),
        ({"chunk_rows": -1}, ValueError, "chunk_rows is -1, expected at least 1"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows is 0, expected at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    h, w, labels = case(torch.float32)
    arguments = {"hidden": h, "head_weight": w, "labels": labels} | change
    for operation in (linear_log_probs, linear_cross_entropy):
        with pytest.raises(error, match=message):
            operation(**arguments)


def test_first_label_out_of_range_is_named_with_its_row():
    h, w, labels = case(torch.float32)
    labels[7], labels[9] = 51, 99
    with pytest.raises(ValueError, match=r"label 51 of row 7 .*; 2 labels are out of range"):
        linear_log_probs(h, w, labels)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1 / 70_000), (torch.float16, 65_536.0)])
def test_scale_of_the_loss_is_not_rounded_to_16_bits(dtype, scale):
    h, w, labels = case(dtype)
    (unit,) = torch.autograd.grad(linear_cross_entropy(h, w.detach(), labels), h)
    (scaled,) = torch.autograd.grad(linear_cross_entropy(h, w.detach(), labels) * scale, h)
    assert torch.equal(scaled, (unit * torch.tensor(scale)).to(dtype))
