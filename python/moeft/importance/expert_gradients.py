"""Gradients of the weights of an expert block, one expert at a time, from what goes into the block and comes back.

Shapes: T tokens of one sequence, k experts per token, R rows of one expert, H hidden, I expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeft.integration import experts_module
from moeft.kernels import nf4
from moeft.kernels.experts.spec import activate
from moeft.modules import NF4Experts
from moeft.modules.nf4_experts import STACKS


class ExpertGradients:
    """The experts of one layer, packed or not.

    Args:
        name: Of the module, for messages.
        module: The experts module.

    Raises:
        UnsupportedModelError: If it is of a kind that moeft does not know.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.module: Any = module
        if isinstance(module, NF4Experts):
            self.layout, self.activation = module.layout, module.act_fn
        else:
            read = experts_module.read(name, module)
            self.layout, self.activation = read.layout, read.activation
        self.biases = experts_module.biases(module)

    def each(
        self, x_TH: Tensor, index_Tk: Tensor, weight_Tk: Tensor, grad_TH: Tensor
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Expert -> the gradient of each of its two matrices, for every expert that has a token.

        The forward of an expert runs once more, in float32 or better.

        Args:
            x_TH: Tokens that went into the block.
            index_Tk: Experts of each token.
            weight_Tk: Weight of each choice.
            grad_TH: Gradient of what came out.
        """
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        weights = self._weights()
        for expert in index_Tk.unique().tolist():
            token_R, choice_R = torch.where(index_Tk == expert)
            with torch.enable_grad():
                gate_up, down = (self._matrix(weight, expert, dtype).requires_grad_() for weight in weights)
                h_R2I = self._linear(x_TH[token_R].to(dtype), gate_up, "gate_up", expert)
                y_RH = self._linear(activate(self.activation, *self.layout.split(h_R2I)), down, "down", expert)
            g_RH = grad_TH[token_R].to(dtype) * weight_Tk[token_R, choice_R, None].to(dtype)
            yield expert, dict(zip(STACKS, torch.autograd.grad(y_RH, (gate_up, down), g_RH), strict=True))

    def inputs(self, x_TH: Tensor, index_Tk: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Expert -> the rows that each of its two matrices is multiplied with, for every expert that has a token.

        Args:
            x_TH: Tokens that went into the block.
            index_Tk: Experts of each token.
        """
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        gate_up = self._weights()[0]
        for expert in index_Tk.unique().tolist():
            x_RH = x_TH[torch.where(index_Tk == expert)[0]].to(dtype)
            h_R2I = self._linear(x_RH, self._matrix(gate_up, expert, dtype), "gate_up", expert)
            activated_RI = activate(self.activation, *self.layout.split(h_R2I))
            yield expert, dict(zip(STACKS, (x_RH, activated_RI), strict=True))

    def _weights(self) -> list[Any]:
        if isinstance(self.module, NF4Experts):
            return [nf4.restore_absmax(self.module.packed_weight(name)) for name in STACKS]
        return [getattr(self.module, name).detach() for name in STACKS]

    def _matrix(self, weight: Any, expert: int, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, Tensor):
            return weight[expert].to(dtype, copy=True)
        return nf4.dequantize(weight.experts(expert, expert + 1), dtype=torch.float32)[0].to(dtype)

    def _linear(self, x: Tensor, weight: Tensor, stack: str, expert: int) -> Tensor:
        bias = self.biases[f"{stack}_bias"]
        bias_of_expert = None if bias is None else bias[expert].detach().to(x.dtype)
        return functional.linear(x, weight.T if self.layout.transposed else weight, bias_of_expert)
