"""The experts of a layer with 4-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeft.kernels import Activation, ExpertLayout, ExpertLora, experts
from moeft.kernels.experts.spec import PLAIN, Lender
from moeft.modules.packed import PackedModule

STACKS = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")


class NF4Experts(PackedModule):
    """Replaces a fused experts module of transformers v5.

    Stacks are ``gate_up_proj [E, 2I, H]`` (gate rows first) and ``down_proj [E, H, I]``, unless ``layout`` says
    otherwise; blocks run along a stack as it is stored. Biases keep their dtype. The call is the same:
    ``(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])``.

    Attributes:
        lender: Brings the stacks to the device of the tokens for as long as they are computed with; the module's own
            tensors then stay in host memory, whatever the module is moved to. None for stacks that lie on the device.
    """

    lender: Lender | None

    def __init__(
        self,
        gate_up_shape: torch.Size,
        down_shape: torch.Size,
        activation: Activation,
        block_size: int,
        double_quant: bool,
        layout: ExpertLayout = PLAIN,
        gate_up_bias: nn.Parameter | None = None,
        down_bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.intermediate_dim, self.hidden_dim = layout.sizes(down_shape)
        self.act_fn = activation
        self.layout = layout
        self.stream_from(None)
        for name, bias in zip(BIASES, (gate_up_bias, down_bias), strict=True):
            self.register_parameter(name, bias)
        self.register_packed("gate_up_proj", gate_up_shape, block_size, double_quant)
        self.register_packed("down_proj", down_shape, block_size, double_quant)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, lora: ExpertLora | None = None
    ) -> Tensor:
        """Run the expert block, with the low-rank factors of an adapter if given."""
        if self.lender is None:
            return self._run(hidden_states, top_k_index, top_k_weights, lora)
        return self._run_eagerly(hidden_states, top_k_index, top_k_weights, lora)

    def stays_in_place(self) -> bool:
        """Whether the stacks are streamed."""
        return self.lender is not None

    def stream_from(self, lender: Lender | None) -> None:
        """Take the stacks from a lender from now on; None for the module's own."""
        self.lender = lender
        if lender is None:  # a method of its own would keep the module alive
            self.__dict__.pop("_run_eagerly", None)
        else:  # since a compiled graph would be made of one slot's memory
            self._run_eagerly = torch.compiler.disable(self._run)

    def _run(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, lora: ExpertLora | None
    ) -> Tensor:
        gate_up, down = (self.packed_weight(name) for name in STACKS)
        # Frozen whatever the flag of the parameter says: transformers sets it on every bias that it loads.
        gate_up_bias, down_bias = (None if b is None else b.detach() for b in (getattr(self, name) for name in BIASES))
        return experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            gate_up,
            down,
            self.act_fn,
            lora,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            layout=self.layout,
            lender=self.lender,
        )

    def extra_repr(self) -> str:  # noqa: D102
        shapes = ", ".join(f"{name}={tuple(shape)}" for name, shape in self.packed_shapes.items())
        return f"{shapes}, block_size={self.block_size}, nf4"
