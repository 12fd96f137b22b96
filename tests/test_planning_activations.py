"""The forecast of activations against the bytes that PyTorch really keeps for the backward pass."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeft
from moeft import families
from moeft.config.sft import Lora
from moeft.integration import fused_norms as norms
from moeft.integration.fused_lora import fuse_lora
from moeft.integration.fused_loss import fuse_loss
from moeft.kernels.rms_norm import gpu
from moeft.planning.activations import head_gradient_bytes, saved_bytes
from moeft.planning.layers import decoder_layers, traits_of
from moeft.planning.model import read_model
from moeft.planning.settings import Settings
from moeft.planning.shapes import LAYERS
from tests.tiny_models import token_ids


def bytes_saved(model, forward):
    """Bytes of distinct storages saved for backward in one forward pass, parameters and buffers aside."""
    kept = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # The tensor too, so that no address is used twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for _, size in kept.values())


def bytes_kept(model, batch_size, length):
    """Those of some rows."""
    ids = token_ids(batch_size, length)
    mask = torch.ones_like(ids)
    if batch_size > 1:
        mask[1:, -1] = 0  # rows of unequal length
    return bytes_saved(model, lambda: model(input_ids=ids, attention_mask=mask, labels=ids))


class KeptAsOnCuda(torch.autograd.Function):
    """The norm on a GPU, which keeps its input and a number of each row (tests/test_kernels_rms_norm.py traces it)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def predicted(checkpoint, settings):
    model = read_model(checkpoint)
    family = families.for_model_type(model.config["model_type"])
    layers = decoder_layers(model.weights, family, model.config)
    return saved_bytes(layers, traits_of(family), settings) + head_gradient_bytes(layers, settings)


@pytest.mark.parametrize("family", sorted(LAYERS))
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused_norms", [False, True])
def test_forecast_is_within_a_tenth_of_what_is_kept(family, checkpoint, dtype, policy, fused_norms, monkeypatch):
    targets = ("attention", "experts", "mlp") if family == "gemma4" else ("attention", "experts")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=moeft.NF4Config())
    model = moeft.add_lora(model, 4, targets=targets, seed=0).train()
    fuse_loss(model.get_base_model())
    fuse_lora(model)
    if fused_norms:
        for module in (norms, sys.modules["moeft.kernels.rms_norm"]):
            monkeypatch.setattr(module, "in_core", lambda x: False)
            monkeypatch.setattr(module, "in_triton", lambda x: True)
        monkeypatch.setattr(gpu, "rms_norm", lambda x, weight, eps, *_: KeptAsOnCuda.apply(x, weight, eps))
        norms.fuse_norms(model)
    if policy == "full":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    for batch_size, length in ((1, 12), (1, 40), (2, 24), (3, 9)):
        settings = Settings(
            lora=Lora(rank=4, targets=targets),
            dtype=dtype,
            max_length=length,
            batch_size=batch_size,
            checkpointing=policy,
            fused_norms=fused_norms,
        )
        kept = bytes_kept(model, batch_size, length)
        assert predicted(checkpoint, settings) == pytest.approx(kept, rel=0.1)
