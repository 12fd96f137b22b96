"""The weights of a model in memory whose importance is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeft import families
from moeft.config.ranges import Numbers
from moeft.integration import lora_targets
from moeft.modules import PackedModule


@dataclass(frozen=True)
class ModelWeight:
    """A linear layer or a stack of experts.

    Attributes:
        name: In the model: ``model.layers.0.self_attn.q_proj``, ``model.layers.0.mlp.experts.down_proj``.
        parameter: Name of the parameter: the same, but for the ``.weight`` of a linear layer.
        layer: Decoder layer.
        layer_path: Module path of that layer.
        shape: Of the weight, not of packed codes.
        device: Where it lies.
    """

    name: str
    parameter: str
    layer: int
    layer_path: str
    shape: tuple[int, ...]
    device: torch.device


def chosen_weights(
    model: Any, family: families.Family, targets: Sequence[str] | None, layers: Numbers | None
) -> list[ModelWeight]:
    """Weights in the order of the layers; arguments as in :func:`moeft.importance.fisher`.

    Raises:
        ValueError: If a target or a layer does not exist.
        AdapterError: If a target matches nothing.
    """
    if targets is None:
        targets = [target for target in lora_targets.TARGETS if lora_targets.weights(model, family, target)]
    found = lora_targets.select(model, family, targets, layers, 1, 1.0, {}, {}, False).weights
    return [_model_weight(model, weight) for weight in sorted(found, key=lambda weight: (weight.layer, weight.name))]


def _model_weight(model: Any, weight: lora_targets.Weight) -> ModelWeight:
    parameter = weight.name if weight.target == "experts" else f"{weight.name}.weight"
    module_path, _, last = parameter.rpartition(".")
    module = model.get_submodule(module_path)
    held = getattr(module, last)
    shape = module.packed_shapes[last] if isinstance(module, PackedModule) else held.shape
    layer_path = weight.name.removesuffix(f".{weight.below}")
    return ModelWeight(weight.name, parameter, weight.layer, layer_path, tuple(shape), held.device)
