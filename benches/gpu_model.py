"""A whole text model of gemma-4-26B-A4B's shapes from random packed weights, made on the device."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import transformers.quantizers  # registers ours, which must not be imported first
from torch import nn

from gpu_harness import Bench, Shapes
from moeft.integration import model_family
from moeft.integration.nf4_config import NF4Config
from moeft.integration.quantizer import replace_modules
from moeft.modules import PackedModule

STANDARD_DEVIATION = 0.02


def text_config(shapes: Shapes) -> transformers.Gemma4TextConfig:
    """The published text config, in code: five sliding layers, then one that attends to everything."""
    full = shapes.hidden > 1000
    pattern = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(shapes.layers)]
    pattern[-1] = "full_attention"
    config = transformers.Gemma4TextConfig(
        vocab_size=shapes.vocabulary,
        vocab_size_per_layer_input=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=2112 if full else 96,
        num_hidden_layers=shapes.layers,
        num_attention_heads=16 if full else 4,
        num_key_value_heads=8 if full else 2,
        head_dim=256 if full else 16,
        global_head_dim=512 if full else 32,
        num_global_key_value_heads=2 if full else 1,
        attention_k_eq_v=True,
        layer_types=pattern,
        sliding_window=1024 if full else 16,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        enable_moe_block=True,
        num_experts=shapes.experts,
        top_k_experts=shapes.top_k,
        moe_intermediate_size=shapes.inner,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    return config


def build(bench: Bench, *, packed_experts: bool = True, packed_rest: bool = True) -> nn.Module:
    """The model with weights drawn on the device, frozen, in training mode."""
    shapes = bench.shapes
    config = text_config(shapes)
    if not packed_experts:
        config._experts_implementation = "moeft"
    default = torch.get_default_dtype()
    torch.set_default_dtype(shapes.dtype)
    try:
        with torch.device("meta"):
            model = transformers.Gemma4ForCausalLM(config)
        if packed_experts:
            packing = NF4Config(attention=packed_rest, mlp=packed_rest, double_quant=True)
            replace_modules(model, model_family.of_model(model), packing)
        model.to_empty(device=bench.device)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    fill(model, bench)
    model.requires_grad_(False)
    return model.train()


@torch.no_grad()
def fill(model: nn.Module, bench: Bench) -> None:
    """Draw every weight; statistics of packed ones give about the same deviation as the others have."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.packed_shapes:
                getattr(module, name).random_(0, 256)
                module.get_buffer(name + "_absmax").random_(0, 256)
                module.get_buffer(name + "_nested_absmax").fill_(0.01)
                module.get_buffer(name + "_nested_offset").fill_(0.05)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(std=STANDARD_DEVIATION)
            else:
                parameter.fill_(1)
        if type(module).__name__.endswith("RotaryEmbedding"):
            fresh = type(module)(model.config, device=bench.device)
            for name, buffer in fresh.named_buffers():
                module.get_buffer(name).copy_(buffer)
        elif "embed_scale" in module._buffers:
            module.embed_scale.fill_(module.scalar_embed_scale)
        elif "layer_scalar" in module._buffers:
            module.layer_scalar.fill_(1)


def inject_routing(model: nn.Module, bench: Bench) -> None:
    """Let routers return decisions drawn beforehand: random weights would send most tokens to few experts."""
    decisions: dict[tuple[int, int], torch.Tensor] = {}

    def replace(layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
            probabilities, weights, index = output
            key = (layer, index.shape[0])
            if key not in decisions:
                decisions[key] = bench.routing(index.shape[0])
            return probabilities, weights, decisions[key]

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.router.register_forward_hook(replace(number))


def unset_buffers(model: nn.Module) -> list[str]:
    """Buffers that hold no number: something that :func:`fill` does not know."""
    return [
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all())
    ]
