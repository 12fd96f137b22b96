"""The norm and its gradient against PyTorch's own."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moeft.kernels.rms_norm import gpu, reference, rms_norm

EPS = 1e-6
# Class of a norm, with what is added to its weight, and whether 16-bit rows are rounded before it.
VARIANTS = {
    "gemma4.Gemma4RMSNorm": (0.0, False),
    "gemma3.Gemma3RMSNorm": (1.0, False),
    "gpt_oss.GptOssRMSNorm": (0.0, False),
    "llama.LlamaRMSNorm": (0.0, True),
}
WIDTH = 96


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
    ],
)
def test_weight_that_does_not_fit_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(2, 8), weight, EPS)


def norm_of_transformers(variant, dtype, width=WIDTH):
    name, kind = variant.split(".")
    norm = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), kind)(width, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    return norm.to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_way_of_a_gpu_has_the_bits_of_transformers(variant, dtype):
    """On the CPU, where PyTorch sums squares as transformers does; a GPU sums them in another order."""
    norm, rows = norm_of_transformers(variant, dtype), torch.randn(3, 50, WIDTH).to(dtype)
    ours, theirs = gpu.rms_norm(rows, norm.weight, EPS, *VARIANTS[variant]), norm(rows)
    assert ours.dtype == theirs.dtype == dtype
    if variant == "gemma4.Gemma4RMSNorm":  # a power of -0.5, which differs from a root by a rounding on the CPU
        assert (ours != theirs).float().mean() < (0.2 if dtype == torch.float32 else 0.001)
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_on_the_way_of_a_gpu_are_those_of_transformers(variant, trained):
    norm = norm_of_transformers(variant, torch.bfloat16).requires_grad_(trained)
    rows, grad = torch.randn(2, 40, WIDTH).bfloat16()
    results = []
    for function in (norm, lambda x: gpu.rms_norm(x, norm.weight, EPS, *VARIANTS[variant])):
        x, norm.weight.grad = rows.clone().requires_grad_(), None
        function(x).backward(grad)
        results.append((x.grad, norm.weight.grad if trained else x.grad))
    for ours, theirs in zip(*results, strict=True):
        # A rounding to bfloat16 where float32 sums have another order; twice that.
        torch.testing.assert_close(ours, theirs, rtol=2 * 2**-8, atol=2**-8)


class Operators(TorchDispatchMode):
    """Names of PyTorch's operators that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "aten":
            self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*arguments, **(keywords or {}))


def traced_on_cuda(variant):
    """Operators of a norm of [4, 8, 16, WIDTH] rows in bfloat16 on a CUDA device without numbers, and what it keeps."""
    kept = []
    with FakeTensorMode(), Operators() as operators:
        x = torch.empty(4, 8, 16, WIDTH, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = None if variant is None else torch.empty(WIDTH, dtype=torch.bfloat16, device="cuda")
        operators.names.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t):
            out = gpu.rms_norm(x, weight, EPS, *VARIANTS.get(variant, (0.0, False)))
    assert (out.dtype, out.shape, out.device.type) == (torch.bfloat16, x.shape, "cuda")
    return operators.names, kept


@pytest.mark.parametrize(
    ("variant", "launches"),
    [(None, 1), ("gemma4.Gemma4RMSNorm", 1), ("llama.LlamaRMSNorm", 2), ("gemma3.Gemma3RMSNorm", 5)],
)
def test_cuda_keeps_the_rows_as_they_are_and_one_number_of_each(variant, launches):
    names, kept = traced_on_cuda(variant)
    assert names.count("_fused_rms_norm") == 1
    assert len(names) == launches, names
    rows = 4 * 8 * 16
    wide = [numel for dtype, numel in kept if dtype == torch.float32]
    assert sum(wide) <= rows
    assert [numel for dtype, numel in kept if dtype != torch.float32 and numel > WIDTH] == [rows * WIDTH]


def test_autocast_leaves_the_norm_in_its_own_type():
    """PyTorch 2.15 makes the operation one of float32 there, output included."""
    rows = torch.randn(4, 8).bfloat16()
    expected = gpu.rms_norm(rows, None, EPS, 0.0, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gpu.rms_norm(rows, None, EPS, 0.0, False), expected)
    assert expected.dtype == torch.bfloat16


def test_weight_that_trains_has_a_gradient():
    x, weight = torch.randn(5, 8), torch.randn(8, requires_grad=True)
    rms_norm(x, weight, EPS, offset=1.0).sum().backward()
    expected = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).sum(0)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_core_adds_the_offset(offset):
    x, weight = torch.randn(5, 8), torch.randn(8)
    torch.testing.assert_close(rms_norm(x, weight, EPS, offset=offset), reference.rms_norm(x, weight, EPS, offset))
