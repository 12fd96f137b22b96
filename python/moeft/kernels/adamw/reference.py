"""The definition of AdamW in plain PyTorch, one rounding to float32 per operation; 8-bit moments as in bitsandbytes.

Source: https://arxiv.org/abs/1711.05101 (AdamW), https://arxiv.org/abs/2110.02861 (block-wise 8-bit moments).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeft.kernels.adamw.moments import BLOCK_SIZE, Moments

STEPS = 65535  # [-1, 1] is cut into as many; the code nearest to a value's step is stored


def step(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    rounded: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    maps: tuple[Tensor, Tensor],
) -> None:
    """Update ``param``, ``moments`` and ``rounded`` as :func:`moeft.kernels.adamw.step` says.

    ``maps`` are the values of the 256 signed and unsigned codes, float32, ascending.
    """
    (beta1, beta2), g = betas, grad.float()
    w, m, v = param.float(), moments.exp_avg, moments.exp_avg_sq
    if moments.exp_avg_absmax is not None and moments.exp_avg_sq_absmax is not None:
        m = dequantize(m, moments.exp_avg_absmax, maps[0])
        v = dequantize(v, moments.exp_avg_sq_absmax, maps[1])
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    exact_root = v.double().sqrt().float()  # torch's float32 root is off by one bit in a fifth of cases
    root = exact_root * (1 / math.sqrt(1 - beta2**step)) + eps
    w = (1 - lr * weight_decay) * w - (lr / (1 - beta1**step)) * (m / root)
    param.copy_(w)
    if rounded is not None:
        rounded.copy_(w)
    if moments.exp_avg_absmax is not None and moments.exp_avg_sq_absmax is not None:
        moments.exp_avg.copy_(quantize(m, moments.exp_avg_absmax, maps[0]))
        moments.exp_avg_sq.copy_(quantize(v, moments.exp_avg_sq_absmax, maps[1]))
    else:
        moments.exp_avg.copy_(m)
        moments.exp_avg_sq.copy_(v)


def quantize(values: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """Codes of ``values``, uint8 in their shape; their scales are written to ``absmax``.

    Those of bitsandbytes' ``quantize_blockwise`` on the CPU, except that zero is stored as zero.
    """
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax.copy_(blocks.abs().amax(1))
    scaled = (blocks * (1 / absmax)[:, None]).flatten()[: flat.numel()].clamp(-1, 1)
    nearest = ((scaled + 1) * (STEPS / 2) + 0.5).nan_to_num(nan=0.0).floor() * (2 / STEPS) - 1
    right = torch.searchsorted(code, nearest).clamp(1, 255)
    is_right = code[right] - nearest < nearest - code[right - 1]
    codes = torch.where(is_right, right, right - 1)
    zero = torch.searchsorted(code, torch.zeros(()))
    return torch.where(flat == 0, zero, codes).to(torch.uint8).view(values.shape)


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """What the codes mean, times their scale; float32 in the shape of ``codes``."""
    scale = absmax.repeat_interleave(BLOCK_SIZE)[: codes.numel()]
    return (code[codes.flatten().long()] * scale).view(codes.shape)
