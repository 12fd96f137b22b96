"""16-bit linear layers on a CPU without 16-bit matrix instructions: the core multiplies, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moeft
from moeft import _core
from moeft.integration.cpu_linears import multiply_in_core
from moeft.modules import FrozenLinear
from tests.tiny_models import save_tiny_model, token_ids

without_instructions = pytest.mark.skipif(
    _core.has_bf16_instructions(), reason="needs a CPU without bf16 instructions; with them PyTorch keeps the layers"
)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a result, at most, relative


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_linear_and_its_gradient_are_float32_sums_rounded_once(dtype, bias):
    torch.manual_seed(0)
    layer = FrozenLinear(33, 21, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(2, 17, 33, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 17, 21, dtype=dtype)
    y = layer(x)
    y.backward(grad)
    weight = layer.weight.double()
    for found, a, b in ((y, x.detach().double(), weight.T), (x.grad, grad.double(), weight)):
        exact = a @ b
        # The sum in float32, its rounding, and with a bias a second rounding of a value below |sum| + |bias|.
        bound = ROUNDING[dtype] * exact.abs() + 1e-5 * (a.abs() @ b.abs())
        if bias and found is y:
            bound += ROUNDING[dtype] * (exact.abs() + 2 * layer.bias.double().abs())
            exact = exact + layer.bias.double()
        assert ((found.detach().double() - exact).abs() <= bound).all()


def test_weight_that_trains_gets_its_gradient():
    layer = FrozenLinear(8, 4).to(torch.bfloat16)
    layer(torch.randn(3, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@without_instructions
def test_loaded_bf16_model_multiplies_in_the_core_and_saves_as_before(tmp_path):
    base = save_tiny_model("gemma4", tmp_path / "base", torch.bfloat16)
    model, _ = moeft.load(base)
    linears = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears.pop("lm_head") is nn.Linear
    assert set(linears.values()) == {FrozenLinear}
    model.save_pretrained(tmp_path / "again")
    assert moeft.checkpoint.fingerprint(tmp_path / "again") == moeft.checkpoint.fingerprint(base)
    adapted = moeft.add_lora(model, 2)
    adapted(input_ids=token_ids(), labels=token_ids()).loss.backward()


def test_float32_layers_are_left_to_pytorch():
    model = nn.Sequential(nn.Linear(4, 4))
    multiply_in_core(model)
    assert type(model[0]) is nn.Linear
