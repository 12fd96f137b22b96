"""One step of AdamW on weights, gradients and moments that lie in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.adamw import cpu
from moeft.kernels.adamw.moments import BLOCK_SIZE, Moments

__all__ = ["BLOCK_SIZE", "DTYPES", "Moments", "step"]

DTYPES = (torch.float32, torch.bfloat16)


def step(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    rounded: Tensor | None = None,
) -> None:
    """Update a weight and its moments in place. Every CPU and number of threads gives the same bits.

    Each operation is rounded to float32 on its own, as in ``reference.py``. A gradient that is not finite spoils its
    weight, as in torch: look before the step.

    Args:
        param: The weight, float32 or bfloat16. bfloat16 is rounded to nearest after the step, which loses an update
            below 1/512 of a weight; a float32 master copy with ``rounded`` keeps it.
        grad: Its gradient in the same shape, float32 or bfloat16.
        moments: Its moments, changed in place.
        lr: Learning rate.
        betas: Decay of the mean of gradients and of the mean of their squares, each in [0, 1).
        eps: Added to the root of the corrected mean of squares.
        weight_decay: The weight loses this part of itself times ``lr``.
        step: Number of this step, from 1.
        rounded: bfloat16 copy of a float32 ``param`` to write.

    Raises:
        ValueError: If a tensor is on another device than the CPU, not contiguous, of another dtype or size, or
            overlaps another one; or a number is out of its range. Nothing is changed then.
    """
    tensors = {"param": param, "grad": grad} | ({} if rounded is None else {"rounded": rounded})
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, expected float32 or bfloat16")
    if rounded is not None and (rounded.dtype, param.dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(f"rounded is {rounded.dtype} beside a {param.dtype} param, expected bfloat16 beside float32")
    moment_dtype = torch.float32 if moments.exp_avg_absmax is None else torch.uint8
    for name, tensor in vars(moments).items():
        if tensor is not None:
            tensors[name] = tensor
            expected = torch.float32 if name.endswith("absmax") else moment_dtype
            if tensor.dtype != expected:
                raise ValueError(f"{name} is {tensor.dtype}, expected {expected}")
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, expected host memory")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    cpu.step(param, grad, moments, rounded, lr, betas, eps, weight_decay, step)
