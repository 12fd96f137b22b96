"""A linear layer whose frozen 16-bit weight the Rust core multiplies."""

from __future__ import annotations

from torch import Tensor, nn

from moeft.kernels.packed_linear import packed_linear


class FrozenLinear(nn.Linear):
    """``nn.Linear`` for CPUs without 16-bit matrix instructions, where PyTorch's 16-bit products are slow.

    Other devices, a weight that trains, and rows in another dtype than the weight's take PyTorch's way.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``; products are summed in float32."""
        if not input.is_cpu or self.weight.requires_grad or input.dtype != self.weight.dtype:
            return super().forward(input)
        return packed_linear(input, self.weight.detach(), self.bias)
