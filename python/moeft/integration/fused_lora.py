"""Let PEFT's LoRA layers of a model add their update in one operation.

PEFT runs two linear modules, scales and adds, each with an output of its own and an operation of its own in backward;
in a 16-bit model each layer also keeps a float32 copy of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from moeft.integration.peft_lora import PackedLinearLora
from moeft.kernels.low_rank import add_low_rank

LAYERS = (Linear, PackedLinearLora)


class FusedLora:
    """Mixed into the class of a LoRA layer: one plain adapter takes the kernel, all else PEFT's own forward."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, adapter included."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or len(active) != 1 or not _is_plain(self, active[0]) or _others_act(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        (name,) = active
        return add_low_rank(
            self.base_layer(x), x, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )


def fuse_lora(model: nn.Module) -> int:
    """Give the LoRA layers of this model instance a forward with one operation for their update.

    The class of a layer becomes a subclass of the one it had. Outputs and gradients differ from PEFT's by roundings of
    the adapter's dtype. With hooks on the modules of the factors PEFT's forward runs, which calls them; factors that a
    launcher shards must be left to PEFT. Fusing again changes nothing.

    Args:
        model: A model with PEFT's adapters, or without.

    Returns:
        How many layers are fused.
    """
    fused, classes = 0, dict[Any, Any]()
    for module in model.modules():
        kind = type(module)
        if kind in LAYERS:
            name = kind.__name__  # by which PEFT recognises layers
            module.__class__ = classes.setdefault(kind, type(name, (FusedLora, kind), {"__module__": kind.__module__}))
        fused += isinstance(module, FusedLora)
    return fused


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter of a layer is a product of two factors and nothing else, at this moment."""
    dropout = layer.lora_dropout[name]
    factors = layer.lora_A[name], layer.lora_B[name]
    return not (
        layer.disable_adapters
        or layer.merged
        or name in layer.lora_variant
        or factors[1].bias is not None
        or any(factor._forward_hooks or factor._forward_pre_hooks for factor in factors)
        or (dropout.training and not isinstance(dropout, nn.Identity))
    )


def _others_act(x: Tensor) -> bool:
    """Whether autocast or a compiler decides what is computed."""
    return torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
