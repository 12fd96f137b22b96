from __future__ import annotations

import pytest
import torch

from moeft.kernels import nf4
from moeft.kernels.grouped_linear import grouped_linear, pytorch, reference
from moeft.kernels.packed_linear import packed_linear

# Summed in float32 and rounded once: twice one rounding's relative RMS. For float32, sums of up to 200 products.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2 * 0.0017, torch.float16: 2 * 0.00021}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def case(dtype, *, counts=(5, 0, 300, 1, 17), out_features=96, in_features=200, block_size=64, double_quant=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(counts), out_features, in_features, generator=generator)
    packed = nf4.quantize(weight, block_size, double_quant)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(counts), in_features, generator=generator).to(dtype)
    g = torch.randn(sum(counts), out_features, generator=generator).to(dtype)
    return packed, nf4.dequantize(packed, dtype=torch.float32), offsets, x, g


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"in_features": 33, "block_size": 32}], ids=str)
def test_rows_and_their_gradients_equal_float64_products(dtype, options):
    packed, dense, offsets, x, g = case(dtype, **options)
    expected = reference.grouped_linear(x.double(), dense.double(), offsets)
    assert relative_error(grouped_linear(x, packed, offsets), expected) < TOLERANCE[dtype]
    expected = reference.grouped_linear(g.double(), dense.double().mT, offsets)
    assert relative_error(grouped_linear(g, packed, offsets, transpose=True), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_few_rows_equal_many(rows):
    packed, _, _, x, _ = case(torch.float32, counts=(64,))
    whole = grouped_linear(x, packed, torch.tensor([0, 64], dtype=torch.int32))
    few = grouped_linear(x[:rows], packed, torch.tensor([0, rows], dtype=torch.int32))
    torch.testing.assert_close(few, whole[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_weights_of_any_dtype_are_multiplied(dtype):
    _, dense, offsets, x, _ = case(torch.float32)
    expected = reference.grouped_linear(x.double(), dense.to(dtype).double(), offsets)
    assert relative_error(grouped_linear(x, dense.to(dtype), offsets), expected) < TOLERANCE[torch.float32]


def test_chunks_of_experts_equal_the_whole_stack():
    packed, _, offsets, x, _ = case(torch.float32)
    whole = pytorch.grouped_linear(x, packed, offsets, False)
    chunked = pytorch.grouped_linear(x, packed, offsets, False, workspace_bytes=2 * 96 * 200 * 4)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_linear_and_its_gradient_equal_float64_products(dtype):
    weight = nf4.quantize(torch.randn(96, 72))
    dense = nf4.dequantize(weight, dtype=torch.float32).double()
    x = torch.randn(2, 9, 72).to(dtype).requires_grad_()
    y = packed_linear(x, weight)
    assert (y.dtype, y.shape) == (dtype, (2, 9, 96))
    assert relative_error(y, x.double() @ dense.mT) < TOLERANCE[dtype]
    grad = torch.randn(2, 9, 96).to(dtype)
    y.backward(grad)
    assert relative_error(x.grad, grad.double() @ dense) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(323, 201)}, r"x has shape \(323, 201\)"),
        ({"x": torch.zeros(323)}, "rows as wide as axis 2"),
        ({"offsets": torch.tensor([0, 5, 5, 305, 306, 324], dtype=torch.int32)}, "x is"),
        ({"offsets": torch.tensor([0, 6, 5, 305, 306, 323], dtype=torch.int32)}, "ascending"),
        ({"offsets": torch.tensor([0, 323], dtype=torch.int32)}, "offsets is 2 long"),
    ],
)
def test_bad_input_is_named(change, message):
    packed, _, offsets, x, _ = case(torch.float32)
    arguments = {"x": x, "offsets": offsets} | change
    with pytest.raises(ValueError, match=message):
        grouped_linear(arguments["x"], packed, arguments["offsets"])
