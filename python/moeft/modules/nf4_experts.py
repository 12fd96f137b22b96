"""The experts of a layer with 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeft.kernels import ExpertLora, experts
from moeft.modules.packed import PackedModule

STACKS = ("gate_up_proj", "down_proj")


class NF4Experts(PackedModule):
    """Replaces a fused experts module of transformers v5 in its default layout.

    Stacks are ``gate_up_proj [E, 2I, H]`` (gate rows first) and ``down_proj [E, H, I]``. The call is the same:
    ``(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])``.
    """

    def __init__(
        self,
        gate_up_shape: torch.Size,
        down_shape: torch.Size,
        activation: Callable[[Tensor], Tensor],
        block_size: int,
        double_quant: bool,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = down_shape
        self.act_fn = activation
        self.register_packed("gate_up_proj", gate_up_shape, block_size, double_quant)
        self.register_packed("down_proj", down_shape, block_size, double_quant)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, lora: ExpertLora | None = None
    ) -> Tensor:
        """Run the expert block, with the low-rank factors of an adapter if given."""
        gate_up, down = (self.packed_weight(name) for name in STACKS)
        return experts(hidden_states, top_k_index, top_k_weights, gate_up, down, self.act_fn, lora)

    def extra_repr(self) -> str:  # noqa: D102
        shapes = ", ".join(f"{name}={tuple(shape)}" for name, shape in self.packed_shapes.items())
        return f"{shapes}, block_size={self.block_size}, nf4"
