"""Packed layers under ``torch.compile``: the same numbers, and no graph break where the layer is an operator."""

from __future__ import annotations

import pytest
import torch

import moeft
from moeft.integration.streaming import stream_experts
from moeft.kernels.nf4.operands import flatten
from moeft.kernels.packed_linear import operator
from moeft.modules import NF4Experts, NF4Linear
from tests.tiny_training import load


def packed(double_quant=False, bias=True):
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=bias)
    layer = NF4Linear(linear, 64, double_quant)
    layer.set_packed("weight", moeft.kernels.nf4.quantize(linear.weight, double_quant=double_quant))
    return layer


def run(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_is_one_graph_with_the_same_bits(double_quant, dtype):
    layer = packed(double_quant)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (3, 20):
        x = torch.randn(2, rows, 24, generator=torch.Generator().manual_seed(rows)).to(dtype)
        for found, expected in zip(run(compiled, x), run(layer, x), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("transpose", [False, True])
def test_packed_linear_operator_passes_opcheck(transpose):
    x = torch.randn(3, 40 if transpose else 24, requires_grad=True)
    arguments = (x, *flatten(packed(double_quant=True).packed_weight("weight")), transpose)
    torch.library.opcheck(operator.product, arguments)


@pytest.mark.parametrize("streamed", [False, True])
def test_compiled_experts_have_the_output_and_gradients_of_eager_ones(checkpoints, streamed):
    model = load(checkpoints["olmoe"], quantization_config=moeft.NF4Config())
    layer = next(module for module in model.modules() if isinstance(module, NF4Experts))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 5, (7, 2), generator=generator)
    inputs = [torch.randn(7, 64, generator=generator), torch.rand(7, 2, generator=generator)]

    def step(call):
        x, weights = (tensor.clone().requires_grad_() for tensor in inputs)
        out = call(x, index, weights)
        out.square().sum().backward()
        return out.detach(), x.grad, weights.grad

    expected = step(layer)
    if streamed:
        stream_experts(model, "cpu")
    for found, wanted in zip(step(torch.compile(layer, backend="aot_eager")), expected, strict=True):
        assert torch.equal(found, wanted)
