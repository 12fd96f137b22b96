"""``experts_implementation="moeft"``: transformers' own experts, unpacked, through the expert block of this package.

With an adapter on the experts, the block adds its low-rank products; PEFT alone would form a second stack of full size.
Stacks that are trained themselves take transformers' ``grouped_mm``, since the block has no gradient for them, or its
loop over experts where that takes no such sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moeft.errors import UnsupportedModelError
from moeft.integration import experts_module
from moeft.kernels import ExpertLora, experts
from moeft.modules.nf4_experts import STACKS

NAME = "moeft"
_read: WeakKeyDictionary[nn.Module, experts_module.ExpertsModule] = WeakKeyDictionary()


def is_active(module: Any) -> bool:
    """Whether a module is one of transformers' fused experts that runs through this implementation."""
    config = getattr(module, "config", None)
    return experts_module.is_fused(module) and getattr(config, "_experts_implementation", None) == NAME


def forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, lora: ExpertLora | None = None
) -> Tensor:
    """Forward of an experts module, as transformers' registry of implementations calls it.

    Args:
        self: The experts module.
        hidden_states: ``[T, H]`` tokens.
        top_k_index: ``[T, k]`` experts of each token.
        top_k_weights: ``[T, k]`` weight of each choice.
        lora: Factors of an adapter, from our PEFT wrapper.

    Raises:
        UnsupportedModelError: If the module is of a kind that the block does not know.
        ValueError: If stacks and an adapter on them are trained together.
    """
    if getattr(self, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            'experts_implementation="moeft" does not run in expert parallel; use "grouped_mm" there'
        )
    stacks: list[Tensor] = [getattr(self, name) for name in STACKS]
    biases = experts_module.biases(self)
    tensors = [*stacks, *(bias for bias in biases.values() if bias is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        if lora is not None:
            raise ValueError("experts and an adapter on them require gradients; freeze one of the two")
        return _train_stacks(self, hidden_states, top_k_index, top_k_weights)
    if self not in _read:
        _read[self] = experts_module.read("experts", self)
    gate_up, down = (stack.detach() for stack in stacks)
    gate_up_bias, down_bias = (None if bias is None else bias.detach() for bias in biases.values())
    return experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up,
        down,
        _read[self].activation,
        lora,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        layout=_read[self].layout,
    )


def takes_grouped_mm(stacks: Iterable[Tensor]) -> bool:
    """Whether PyTorch's grouped product takes stacks of these sizes: rows and columns of whole 16 bytes."""
    return all(size * stack.element_size() % 16 == 0 for stack in stacks for size in stack.shape[-2:])


def _train_stacks(self: Any, *inputs: Tensor) -> Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if takes_grouped_mm(getattr(self, name) for name in STACKS):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *inputs)
    # transformers wraps the loop of the class in the choice of an implementation.
    return type(self).forward.__wrapped__(self, *inputs)
