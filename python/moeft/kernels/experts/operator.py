"""The expert block on a GPU as two operators of PyTorch, opaque to ``torch.compile`` and to CUDA graphs' checks.

A stack is passed as :func:`moeft.kernels.nf4.operands.flatten` gives it, because operators take no objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeft.kernels.experts import gpu
from moeft.kernels.nf4.operands import unflatten
from moeft.kernels.out_of_memory import naming
from moeft.kernels.routing import Buckets

KNOB = "fewer tokens in a micro-batch (per_device_train_batch_size, data.max_length) make it smaller"


def _factors(a: Tensor | None, b: Tensor | None, scaling: float) -> gpu.Factors | None:
    return None if a is None or b is None else gpu.Factors(a, b, scaling)


@torch.library.custom_op("moeft::experts_forward", mutates_args=())
def experts_forward(
    x: Tensor,
    weights: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_sizes: Sequence[int],
    down: Sequence[Tensor],
    down_sizes: Sequence[int],
    codebook: str,
    a_up: Tensor | None,
    b_up: Tensor | None,
    a_down: Tensor | None,
    b_down: Tensor | None,
    scaling_up: float,
    scaling_down: float,
    gate: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and what backward needs; see :func:`moeft.kernels.experts.gpu.forward`."""
    with naming(f"the forward pass of an expert block on {weights.numel():,} rows", KNOB):
        out, saved = gpu.forward(
            x,
            weights,
            unflatten(gate_up, gate_up_sizes, codebook),
            unflatten(down, down_sizes, codebook),
            _factors(a_up, b_up, scaling_up),
            _factors(a_down, b_down, scaling_down),
            Buckets(permutation, inverse, offsets),
            gate,
            keep,
        )
    return out, *saved


@experts_forward.register_fake
def _(x: Tensor, weights: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes, a_up, a_down, keep = others[4], others[8], others[10], others[15]

    def kept(columns: int, wanted: bool) -> Tensor:
        return x.new_empty(weights.numel(), columns) if wanted else x.new_empty(0)

    up_rank, down_rank = (0 if a is None else a.shape[0] // sizes[0] for a in (a_up, a_down))
    return (
        x.new_empty(x.shape),
        kept(sizes[1], keep),
        kept(up_rank, keep and a_up is not None),
        kept(down_rank, keep and a_down is not None),
    )


@torch.library.custom_op("moeft::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_sizes: Sequence[int],
    down: Sequence[Tensor],
    down_sizes: Sequence[int],
    codebook: str,
    a_up: Tensor | None,
    b_up: Tensor | None,
    a_down: Tensor | None,
    b_down: Tensor | None,
    scaling_up: float,
    scaling_down: float,
    gate: str,
    h: Tensor,
    low_up: Tensor,
    low_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weights`` and the factors; see :func:`moeft.kernels.experts.gpu.backward`."""
    with naming(f"the backward pass of an expert block on {weights.numel():,} rows", KNOB):
        return gpu.backward(
            grad,
            x,
            weights,
            unflatten(gate_up, gate_up_sizes, codebook),
            unflatten(down, down_sizes, codebook),
            _factors(a_up, b_up, scaling_up),
            _factors(a_down, b_down, scaling_down),
            Buckets(permutation, inverse, offsets),
            gate,
            gpu.Saved(h, low_up, low_down),
        )


@experts_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, *others: Any) -> tuple[Tensor, ...]:
    gradients = (x.new_empty(0) if factor is None else factor.new_empty(factor.shape) for factor in others[8:12])
    return x.new_empty(x.shape), weights.new_empty(weights.shape), *gradients
