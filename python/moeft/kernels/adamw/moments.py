"""Running means of an Adam optimiser, in float32 or in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 256  # values of a moment that share one scale, as in bitsandbytes' optimisers


@dataclass
class Moments:
    """Means of the gradients and of their squares for one weight of n values.

    Attributes:
        exp_avg: float32 in the shape of the weight; or uint8 codes, signed.
        exp_avg_sq: The same for the squares; codes are unsigned.
        exp_avg_absmax: Scales of the codes, float32 ``[ceil(n / 256)]``; None for float32 moments.
        exp_avg_sq_absmax: The same for the squares.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None

    @classmethod
    def zeros(cls, shape: torch.Size, bits: int) -> Moments:
        """Moments before the first step, on the host.

        Args:
            shape: Shape of the weight.
            bits: 32, which takes 8 bytes per value, or 8, which takes 2.03.

        Raises:
            ValueError: If ``bits`` is neither.
        """
        if bits == 32:
            return cls(torch.zeros(shape), torch.zeros(shape))
        if bits == 8:
            blocks = -(-shape.numel() // BLOCK_SIZE)
            codes = torch.zeros(shape, dtype=torch.uint8)
            return cls(codes, codes.clone(), torch.zeros(blocks), torch.zeros(blocks))
        raise ValueError(f"bits is {bits!r}, expected 32 or 8")
