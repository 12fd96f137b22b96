"""An adapter that changes some experts of a layer only.

PEFT keeps the factors of all experts of a stack in two tensors. Those of an expert that is not chosen are zero, both of
them. The gradient of each factor is a product with the other one, so both stay exactly zero under every optimiser that
leaves a parameter without gradient and without value where it is; the file is an ordinary PEFT adapter, and says by
itself which experts it changes. It is as large as one of all experts, and so are the gradients and the optimiser's
states: choosing experts limits what changes, not memory. Fewer layers or a lower rank save memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from moeft import families
from moeft.config.ranges import Numbers, expand

Experts = Literal["all"] | Numbers | Mapping[int, Iterable[int]]
"""All experts, the same ones in every layer, or those of each layer by its number."""


@torch.no_grad()
def keep_experts(model: nn.Module, family: families.Family, adapter: str, experts: Experts) -> None:
    """Zero the factors of every expert that is not chosen.

    Args:
        model: Model with adapter wrappers; changed in place.
        family: Its family.
        adapter: Name of the adapter, fresh or trained.
        experts: The experts to keep. A layer that a mapping does not name keeps none.

    Raises:
        ValueError: If an expert or a layer does not exist.
    """
    if experts == "all":
        return
    by_layer = {int(layer): set(chosen) for layer, chosen in experts.items()} if isinstance(experts, Mapping) else None
    everywhere = set() if isinstance(experts, Mapping) else set(expand(experts, "experts"))
    seen = set()
    for path, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or adapter not in module.lora_A:
            continue
        layer = _layer(path, family)
        seen.add(layer)
        chosen = everywhere if by_layer is None else by_layer.get(layer, set())
        if outside := sorted(expert for expert in chosen if not 0 <= expert < module.num_experts):
            raise ValueError(
                f"experts names {outside[0]}, but layer {layer} has the experts 0 to {module.num_experts - 1}"
            )
        dropped = torch.tensor([expert not in chosen for expert in range(module.num_experts)])
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        a.view(module.num_experts, -1, a.shape[1])[dropped.to(a.device)] = 0
        b.view(b.shape[0], -1, module.num_experts)[:, :, dropped.to(b.device)] = 0
    if by_layer is not None and (absent := sorted(by_layer.keys() - seen)):
        raise ValueError(f"experts names layer {absent[0]}, but the adapter changes experts in layers {sorted(seen)}")


def _layer(path: str, family: families.Family) -> int:
    name = path.removeprefix("base_model.model.").replace(".base_layer", "")
    return int(name.removesuffix(f".{family.experts}").rpartition(".")[2])
