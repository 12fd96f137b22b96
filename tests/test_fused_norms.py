"""Norms of one pass in place of those of transformers."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moeft.integration import fused_norms
from moeft.integration.fused_norms import FusedNorm, fuse_norms
from moeft.kernels.rms_norm import gpu
from moeft.training.arguments import MoeConfig
from tests.tiny_models import tiny_model, token_ids
from tests.tiny_training import load, packed_with_lora, sft_trainer

WITH_BOTH_OFFSETS = ["gemma4", "qwen3_moe", "gpt_oss"]


def norms(model):
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def loss_and_gradients(model):
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", WITH_BOTH_OFFSETS)
def test_loss_and_gradients_stay_those_of_transformers(checkpoints, name):
    stock = packed_with_lora(checkpoints[name])
    fused = copy.deepcopy(stock)
    assert fuse_norms(fused) == len(norms(stock)) > 0
    assert all(isinstance(norm, FusedNorm) for norm in norms(fused))
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(fused), loss_and_gradients(stock)
    # Two dozen norms in a row, each some roundings of 6e-8 off.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_norm_that_adds_one_to_its_weight_is_recognised():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(16).requires_grad_(False)
    norm.weight.normal_()
    x = torch.randn(3, 16)
    expected = norm(x)
    assert fuse_norms(norm) == 1
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)


def test_norm_of_another_formula_keeps_its_own():
    class CenteredRMSNorm(nn.Module):
        eps = 1e-6

        def forward(self, x):
            return x - x.mean(-1, keepdim=True)

    assert fuse_norms(CenteredRMSNorm()) == 0


def test_copy_of_a_fused_norm_has_weights_of_its_own(checkpoints):
    model = load(checkpoints["qwen3_moe"]).requires_grad_(False)
    fuse_norms(model)
    first = norms(model)[0]
    other = copy.deepcopy(first)
    other.weight.zero_()
    x = torch.randn(2, len(first.weight))
    assert not other(x).any()
    assert first(x).any()
    assert fuse_norms(model) == len(norms(model))


def test_trained_and_16_bit_norms_keep_their_own_forward(checkpoints):
    norm = norms(load(checkpoints["qwen3_moe"]))[0]
    fuse_norms(norm)
    norm(torch.randn(2, len(norm.weight))).sum().backward()
    assert norm.weight.grad is not None
    assert norm.bfloat16()(torch.randn(2, len(norm.weight)).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("asked", [None, False, True])
def test_trainer_fuses_norms_on_the_cpu_only_if_asked(checkpoints, asked, tmp_path):
    model = packed_with_lora(checkpoints["qwen3_moe"])
    sft_trainer(model, tmp_path, fused_norms=asked)
    assert any(isinstance(norm, FusedNorm) for norm in norms(model)) is bool(asked)


@pytest.mark.parametrize(
    ("device", "asked", "fused"),
    [("cuda", None, True), ("cuda", False, False), ("cpu", None, False), ("cpu", True, True)],
)
def test_norms_are_fused_by_default_on_a_gpu_alone(device, asked, fused):
    arguments = SimpleNamespace(device=torch.device(device), fused_norms=asked)
    assert MoeConfig.fuses_norms.fget(arguments) is fused


@pytest.mark.parametrize("name", [*WITH_BOTH_OFFSETS, "gemma3"])
def test_16_bit_model_on_the_way_of_a_gpu_is_that_of_transformers(name, monkeypatch):
    model = tiny_model(name).bfloat16()
    model.set_experts_implementation("eager")  # PyTorch refuses the others such narrow rows
    fused = copy.deepcopy(model)
    calls, original = [], gpu.rms_norm
    monkeypatch.setattr(gpu, "rms_norm", lambda *a: calls.append(1) or original(*a))
    for module in (fused_norms, sys.modules["moeft.kernels.rms_norm"]):
        monkeypatch.setattr(module, "in_core", lambda x: False)
        monkeypatch.setattr(module, "in_triton", lambda x: True)
    assert fuse_norms(fused) == len(norms(model))
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(fused), loss_and_gradients(model)
    assert len(calls) >= len(norms(model))
    assert gradients.keys() == expected.keys()
    if name != "gemma4":
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(gradient, expected[key]) for key, gradient in gradients.items())
    # A power of -0.5 differs from a root by a rounding of float32, which may turn a rounding to 16 bits.
    torch.testing.assert_close(loss, expected_loss, rtol=2**-8, atol=0)
    for key, gradient in gradients.items():
        error = (gradient - expected[key]).float().norm() / expected[key].float().norm().clamp(min=1e-6)
        assert error < 0.02, key


def test_norm_that_rounds_in_another_order_runs_its_own_forward_in_16_bits():
    class TwiceRMSNorm(nn.Module):
        """Rounds before the root is applied, too."""

        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(16), requires_grad=False), 1e-6

        def forward(self, x):
            root = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)
            return self.weight * (x * root)

    norm = TwiceRMSNorm()
    assert fuse_norms(norm) == 1
    assert norm.moeft_formula == (0.0, None)


def test_norm_with_more_than_a_weight_keeps_its_own_forward():
    class BiasedRMSNorm(nn.RMSNorm):
        def __init__(self):
            super().__init__(8, eps=1e-6)
            self.bias = nn.Parameter(torch.zeros(8))

    assert fuse_norms(BiasedRMSNorm()) == 0


@pytest.mark.parametrize("place", ["meta", "bfloat16"])
def test_norm_is_recognised_wherever_its_weight_is(place):
    model = tiny_model("gemma4").to(place if place == "meta" else torch.bfloat16)
    with torch.device("meta"):  # a default that a program may have set
        assert fuse_norms(model) == len(norms(model)) > 0
