"""Norms of one pass in place of those of transformers."""

import copy

import pytest
import torch
from torch import nn

from moeft.integration.fused_norms import FusedNorm, fuse_norms
from tests.tiny_models import token_ids
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


@pytest.mark.parametrize("asked", [False, True])
def test_trainer_fuses_norms_only_if_asked(checkpoints, asked, tmp_path):
    model = packed_with_lora(checkpoints["qwen3_moe"])
    sft_trainer(model, tmp_path, fused_norms=asked)
    assert any(isinstance(norm, FusedNorm) for norm in norms(model)) is asked
