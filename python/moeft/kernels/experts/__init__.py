"""The expert block of a Mixture-of-Experts layer: gate/up, activation, down, LoRA and combine in one operation.

Shapes: T tokens, k experts per token, R = T * k rows, E experts, H hidden, I expert hidden, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeft.kernels.experts import cpu, function
from moeft.kernels.experts.lora import ExpertLora, LoraFactors
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.routing import bucket

__all__ = ["ExpertLora", "LoraFactors", "experts"]


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: NF4Weight | Tensor,
    down: NF4Weight | Tensor,
    activation: Callable[[Tensor], Tensor],
    lora: ExpertLora | None = None,
) -> Tensor:
    """Send every token through its experts and add up the results.

    The weights are frozen: gradients reach ``x``, ``top_k_weights`` and the LoRA factors. The delta ``B @ A`` and the
    gradient of a full weight are never formed. Under autocast the rows are cast to its dtype.

    Args:
        x: ``[T, H]`` tokens, float32, bfloat16 or float16.
        top_k_index: ``[T, k]`` experts of each token, int32 or int64.
        top_k_weights: ``[T, k]`` weight of each choice.
        gate_up: ``[E, 2I, H]``, gate rows first; packed or dense.
        down: ``[E, H, I]``, packed or dense.
        activation: Elementwise function of the gate.
        lora: Low-rank factors to add, in PEFT's layout.

    Returns:
        ``[T, H]`` in the dtype of ``x``; summed over the choices in fixed order, so deterministic.

    Raises:
        ValueError: If shapes do not fit together, or a dense weight requires a gradient.
    """
    _check_shapes(x, top_k_index, top_k_weights, gate_up, down)
    dtype = x.dtype
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    buckets = bucket(top_k_index, gate_up.shape[0])
    lora = lora or ExpertLora()
    gate = cpu.gate_of(activation) if device == "cpu" and x.dtype in cpu.DTYPES else None
    block, activation = (function.ExpertBlock, activation) if gate is None else (cpu.ExpertBlock, gate)
    out = block.apply(
        x, top_k_weights, *lora.gate_up.tensors, *lora.down.tensors, buckets, gate_up, down, activation, lora.scalings
    )
    return out.to(dtype)


def _check_shapes(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: NF4Weight | Tensor, down: NF4Weight | Tensor
) -> None:
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if len(weight.shape) != 3:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected a stack of experts with 3 axes")
        if isinstance(weight, Tensor) and weight.requires_grad:
            raise ValueError(f"{name} requires a gradient, but this operation trains only LoRA; freeze the weight")
    num_experts, hidden, inner = down.shape
    if tuple(gate_up.shape) != (num_experts, 2 * inner, hidden):
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)}, expected {(num_experts, 2 * inner, hidden)} "
            f"to go with down of shape {tuple(down.shape)}"
        )
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [tokens, {hidden}]")
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != x.shape[:1] or top_k_index.ndim != 2:
        raise ValueError(
            f"top_k_index has shape {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)}, "
            f"expected [{x.shape[0]}, k] for both"
        )
