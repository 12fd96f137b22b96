"""The expert block of a Mixture-of-Experts layer: gate/up, activation, down, LoRA and combine in one operation.

Shapes: T tokens, k experts per token, R = T * k rows, E experts, H hidden, I expert hidden, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.dispatch import choice, in_core, in_triton
from moeft.kernels.experts import cpu, function, fused, reference
from moeft.kernels.experts.lora import ExpertLora, LoraFactors
from moeft.kernels.experts.spec import PLAIN, Activation, ClampedSwiglu, ExpertLayout, Lender, Weights
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.routing import bucket

__all__ = ["Activation", "ClampedSwiglu", "ExpertLayout", "ExpertLora", "LoraFactors", "experts"]


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: NF4Weight | Tensor,
    down: NF4Weight | Tensor,
    activation: Activation,
    lora: ExpertLora | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    layout: ExpertLayout = PLAIN,
    lender: Lender | None = None,
) -> Tensor:
    """Send every token through its experts and add up the results.

    The weights are frozen: gradients reach ``x``, ``top_k_weights`` and the LoRA factors. The delta ``B @ A`` and the
    gradient of a full weight are never formed. Under autocast the rows are cast to its dtype.

    On the CPU all of it happens in the Rust core, in float32 between the rounding of inputs and outputs, and on a GPU
    in Triton's kernels, without waiting for the device. An activation that these do not know, and float64, go through
    PyTorch; on a GPU so do transposed and interleaved stacks and biases.

    Args:
        x: ``[T, H]`` tokens, float32, bfloat16 or float16.
        top_k_index: ``[T, k]`` experts of each token, int32 or int64.
        top_k_weights: ``[T, k]`` weight of each choice.
        gate_up: ``[E, 2I, H]``, gate rows first, unless ``layout`` says otherwise; packed or dense.
        down: ``[E, H, I]``, unless ``layout`` says otherwise; packed or dense.
        activation: Elementwise function of the gate, which multiplies up; or :class:`ClampedSwiglu` of both.
        lora: Low-rank factors to add, in PEFT's layout.
        gate_up_bias: ``[E, 2I]``, added to gate and up; frozen.
        down_bias: ``[E, H]``, added to the output of an expert; frozen.
        layout: How the stacks are stored.
        lender: Brings the stacks to the device of ``x`` when forward and backward compute with them; ``gate_up`` and
            ``down`` then say only how they look, and may lie anywhere.

    Returns:
        ``[T, H]`` in the dtype of ``x``; summed over the choices in fixed order, so deterministic.

    Raises:
        ValueError: If shapes do not fit together, tensors lie on several devices, or a dense weight or a bias requires
            a gradient.
    """
    _check_weights(gate_up, down, gate_up_bias, down_bias, layout)
    _check_tokens(x, top_k_index, top_k_weights, layout.sizes(down.shape)[2])
    lora = lora or ExpertLora()
    _check_devices(
        x,
        top_k_index=top_k_index,
        top_k_weights=top_k_weights,
        **({"gate_up": gate_up, "down": down} if lender is None else {"the stream of experts": lender}),
        **{f"a factor of {name}": a for name, (a, _, _) in zip(lora._fields, lora, strict=True)},
    )
    dtype = x.dtype
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    weights = Weights(gate_up, down, gate_up_bias, down_bias, layout, lender)
    if choice() == "reference":
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        with weights.in_place() as (gate_up, down, *_):
            return reference.experts(
                x, top_k_index, top_k_weights, gate_up, down, activation, lora, **biases, layout=layout
            ).to(dtype)
    buckets = bucket(top_k_index, gate_up.shape[0])
    leaves = (x, top_k_weights, *lora.gate_up.tensors, *lora.down.tensors)
    gate = cpu.gate_of(activation)
    if gate is not None and in_core(x):
        return cpu.ExpertBlock.apply(*leaves, buckets, weights, gate, lora.scalings).to(dtype)
    if gate is not None and in_triton(x) and fused.knows(weights, gate.name):
        keep = torch.is_grad_enabled()
        return fused.ExpertBlock.apply(*leaves, *buckets, weights, gate.name, lora.scalings, keep).to(dtype)
    return function.ExpertBlock.apply(*leaves, buckets, weights, activation, lora.scalings).to(dtype)


def _check_weights(
    gate_up: NF4Weight | Tensor,
    down: NF4Weight | Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: ExpertLayout,
) -> None:
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if len(weight.shape) != 3:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected a stack of experts with 3 axes")
    num_experts, inner, hidden = layout.sizes(down.shape)
    expected = layout.gate_up_shape(num_experts, inner, hidden)
    if tuple(gate_up.shape) != expected:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)}, expected {expected} "
            f"to go with down of shape {tuple(down.shape)}{' (both transposed)' if layout.transposed else ''}"
        )
    for name, bias, size in (("gate_up_bias", gate_up_bias, 2 * inner), ("down_bias", down_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (num_experts, size):
            raise ValueError(f"{name} has shape {tuple(bias.shape)}, expected {(num_experts, size)}")
    frozen = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, tensor in frozen.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, but this operation trains only LoRA; freeze the weight")


def _check_devices(x: Tensor, **others: NF4Weight | Tensor | Lender | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}; move the layer to one device")


def _check_tokens(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, hidden: int) -> None:
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [tokens, {hidden}]")
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != x.shape[:1] or top_k_index.ndim != 2:
        raise ValueError(
            f"top_k_index has shape {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)}, "
            f"expected [{x.shape[0]}, k] for both"
        )
