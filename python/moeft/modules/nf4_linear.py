"""A linear layer with a 4-bit weight."""

from __future__ import annotations

from torch import Tensor, nn

from moeft.kernels.packed_linear import packed_linear
from moeft.modules.packed import PackedModule


class NF4Linear(PackedModule):
    """Replaces ``nn.Linear``; the bias, if any, keeps its dtype."""

    def __init__(self, linear: nn.Linear, block_size: int, double_quant: bool) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_packed("weight", linear.weight.shape, block_size, double_quant)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return packed_linear(x, self.packed_weight("weight"), self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"
