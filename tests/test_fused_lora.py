"""The one-operation update of LoRA layers against PEFT's own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import moeft
from moeft.integration.fused_lora import FusedLora, fuse_lora
from moeft.kernels.low_rank import add_low_rank
from tests.tiny_models import token_ids
from tests.tiny_training import load, sft_trainer


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def with_lora(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = TwoLayers().to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=9, target_modules=["first", "second"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, FusedLora)]


def test_gradients_are_those_of_finite_differences():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (y, x, a, b)]
    assert torch.autograd.gradcheck(lambda y, x, a, b: add_low_rank(y, x, a, b, 1.7), arguments)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_output_and_gradients_are_those_of_peft(dtype, rtol):
    peft = with_lora(dtype)
    fused = copy.deepcopy(peft)
    assert fuse_lora(fused) == fuse_lora(fused) == 2
    x = torch.randn(3, 5, 24, dtype=dtype)
    for ours, theirs in zip(output_and_gradients(fused, x), output_and_gradients(peft, x), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() <= rtol * theirs.float().norm()


def test_16_bit_model_keeps_no_float32_copy_of_inputs():
    model = with_lora(torch.bfloat16)
    fuse_lora(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.randn(6, 24, dtype=torch.bfloat16))
    widths = {tensor.shape[-1] for tensor in kept if tensor.dtype == torch.float32 and tensor.shape[0] == 6}
    assert widths == {4}  # the rank


@pytest.mark.parametrize(
    "case", ["dropout", "dora", "lora_bias", "disabled", "merged", "two adapters", "autocast", "adapter_names", "hooks"]
)
def test_what_is_not_one_plain_adapter_is_left_to_peft(case, monkeypatch):
    options = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}
    model = with_lora(**options.get(case, {}))
    if case == "two adapters":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
        model.base_model.set_adapter(["default", "other"])
    if case == "hooks":
        for name, module in model.named_modules():
            if "lora_A" in name:
                module.register_forward_hook(lambda *_: None)
    if case == "merged":
        model.merge_adapter()
    fuse_lora(model)
    monkeypatch.setattr("moeft.integration.fused_lora.add_low_rank", None)  # calling it fails
    x = torch.randn(4, 24)
    if case == "disabled":
        with model.disable_adapter():
            model(x)
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    elif case == "adapter_names":
        model.eval()(x, adapter_names=["default", "__base__"] * 2)
    else:
        model(x)


def test_adapter_saved_from_fused_layers_is_that_of_unfused_ones(tmp_path):
    model = with_lora()
    model.save_pretrained(tmp_path / "before")
    fuse_lora(model)
    model.save_pretrained(tmp_path / "after")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("packed", [False, True])
def test_trainer_fuses_the_layers_of_a_model_and_their_loss_stays(checkpoints, packed, tmp_path):
    quantization = moeft.NF4Config(attention=packed)
    base = load(checkpoints["gemma4"], quantization_config=quantization)
    model = moeft.add_lora(base, 4, targets=("attention",), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = token_ids()
    before = model(input_ids=ids, labels=ids).loss
    sft_trainer(model, tmp_path)
    assert lora_layers(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, before, rtol=1e-5, atol=0)
