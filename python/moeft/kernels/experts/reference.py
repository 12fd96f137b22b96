"""The definition of the expert block: one expert at a time, gradients by autograd.

Shapes: T tokens, k experts per token, E experts, H hidden, I expert hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeft.kernels import nf4
from moeft.kernels.experts.lora import ExpertLora, LoraFactors, split_a, split_b
from moeft.kernels.experts.spec import PLAIN, Activation, ExpertLayout, activate
from moeft.kernels.nf4 import NF4Weight


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
) -> Tensor:
    """As :func:`moeft.kernels.experts`, written to be read: it forms ``W + scaling * B @ A`` of every expert."""
    lora = lora or ExpertLora()
    gate_up_EFH = _effective(gate_up, lora.gate_up, x.dtype, layout)
    down_EHI = _effective(down, lora.down, x.dtype, layout)
    out = torch.zeros_like(x)
    for expert in range(gate_up_EFH.shape[0]):
        token, choice = torch.where(top_k_index == expert)
        gate, up = layout.split(functional.linear(x[token], gate_up_EFH[expert], _bias(gate_up_bias, expert, x.dtype)))
        y = functional.linear(activate(activation, gate, up), down_EHI[expert], _bias(down_bias, expert, x.dtype))
        out = out.index_add(0, token, (y * top_k_weights[token, choice, None]).to(out.dtype))
    return out


def _effective(weight: NF4Weight | Tensor, lora: LoraFactors, dtype: torch.dtype, layout: ExpertLayout) -> Tensor:
    """The weight with its delta, ``[E, out, in]``."""
    dense = nf4.dequantize(weight, dtype=dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)
    if layout.transposed:
        dense = dense.mT
    if lora.a is None or lora.b is None:
        return dense
    num_experts = dense.shape[0]
    return dense + lora.scaling * (split_b(lora.b, num_experts) @ split_a(lora.a, num_experts)).to(dtype)


def _bias(bias: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[expert].to(dtype)
