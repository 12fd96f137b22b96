"""The packed experts module against transformers' own experts, on the weights that the packed one restores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeft.integration import experts_module
from moeft.kernels import nf4
from moeft.modules import NF4Experts
from moeft.modules.packed import members_of
from tests.tiny_models import MOE_NAMES, UNKNOWN_NAMES, tiny_model


@pytest.fixture(params=[*MOE_NAMES, *UNKNOWN_NAMES])
def family(request):
    return request.param


def experts_of(family: str) -> nn.Module:
    return next(m for m in tiny_model(family).modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter))


def unpacked(plain: nn.Module, double_quant: bool) -> NF4Experts:
    """The module under test, without values."""
    spec = experts_module.read("experts", plain)
    shapes = plain.gate_up_proj.shape, plain.down_proj.shape
    return NF4Experts(*shapes, spec.activation, 64, double_quant, spec.layout, **experts_module.biases(plain))


def packed_and_rounded(family: str, double_quant: bool) -> tuple[NF4Experts, nn.Module]:
    """The module under test, and transformers' module with the same values."""
    plain = experts_of(family).requires_grad_(False)
    packed = unpacked(plain, double_quant)
    for name in packed.packed_shapes:
        weight = nf4.quantize(getattr(plain, name), double_quant=double_quant)
        for member, tensor in members_of(name, weight).items():
            setattr(packed, member, nn.Parameter(tensor, requires_grad=False) if member == name else tensor)
        getattr(plain, name).copy_(nf4.dequantize(weight, dtype=torch.float32))
    return packed, plain


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_block_output_and_gradients_equal_transformers(family, implementation, double_quant):
    packed, plain = packed_and_rounded(family, double_quant)
    plain.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(29, packed.hidden_dim, generator=generator)
    index = torch.rand(29, packed.num_experts, generator=generator).topk(2).indices
    weights = torch.rand(29, 2, generator=generator)
    gradient = torch.randn(29, packed.hidden_dim, generator=generator)

    def run(module):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = module(leaves[0], index, leaves[1])
        out.backward(gradient)
        return out.detach(), leaves[0].grad, leaves[1].grad

    for ours, theirs in zip(run(packed), run(plain), strict=True):
        # Float32 sums of up to 160 terms in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_packed_weight_is_what_the_state_dict_holds(family):
    packed, plain = packed_and_rounded(family, double_quant=True)
    copy = unpacked(plain, double_quant=True).to_empty(device="cpu")
    copy.load_state_dict(packed.state_dict(), strict=True)
    for name in packed.packed_shapes:
        restored = nf4.dequantize(copy.packed_weight(name), dtype=torch.float32)
        assert torch.equal(restored, nf4.dequantize(packed.packed_weight(name), dtype=torch.float32))
