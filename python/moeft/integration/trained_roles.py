"""Train a model's own weights, chosen by role; everything else is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from torch import nn

from moeft import families
from moeft.config.roles import Role, check_roles
from moeft.errors import UnsupportedModelError
from moeft.integration import model_family
from moeft.modules import PackedModule

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def train_roles(model: PreTrainedModel | PeftModel, roles: Sequence[str]) -> tuple[str, ...]:
    """Let the weights of some roles train in full and freeze all others but those of adapters.

    What is frozen gets no gradient and no optimiser state.

    Args:
        model: A transformers model of a known family, after its adapters were added.
        roles: Some of attention, experts, router, embeddings (the head too), norms, mlp (dense and shared experts).

    Returns:
        Names of the parameters that train now, without those of adapters.

    Raises:
        ValueError: If a role is unknown or named twice.
        UnsupportedModelError: If the model has no weight of a role, or holds it in 4 bit or another type of integer.
    """
    known = get_args(Role)
    if unknown := [role for role in roles if role not in known]:
        raise ValueError(f"train names {unknown[0]!r}, expected some of {', '.join(known)}")
    check_roles(roles)
    by_role: dict[str, list[str]] = {role: [] for role in roles}
    packed: dict[str, str] = {}
    for name, parameter, owner, role in parameters_by_role(model):
        parameter.requires_grad_(False)
        if role not in by_role:
            continue
        if isinstance(owner, PackedModule) or not parameter.is_floating_point():
            packed.setdefault(role, name)
            continue
        parameter.requires_grad_()
        by_role[role].append(name)
    for role in roles:
        if role in packed:
            raise UnsupportedModelError(
                f"train names {role}, but {packed[role]} is held in 4 bit and cannot train; set quantization.{role} to "
                "false and give a 16-bit checkpoint"
            )
        if not by_role[role]:
            has = sorted({found for _, _, _, found in parameters_by_role(model) if found})
            raise UnsupportedModelError(f"train names {role}, but the model has none; it has {', '.join(has)}")
    return tuple(name for names in by_role.values() for name in names)


def parameters_by_role(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str | None]]:
    """Name, parameter, module that owns it and role of all parameters but those of adapters; shared ones once.

    The role is None for what never trains, such as the scale of a layer.
    """
    family = model_family.of_model(model)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if ".lora_" not in name and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter, module, _role(family, model_family.name_in_base(name))


def _role(family: families.Family, name: str) -> str | None:
    component = family.component(name)
    *modules, _ = name.split(".")
    if component in ("other", "attention") and modules and "norm" in modules[-1]:
        return "norms"
    if component != "other":
        return component
    if family.experts and (family.below_layer(name) or "").startswith(family.experts + "."):
        return "experts"  # their biases
    # A router may hold more than its linear layer: scales of its input or of single experts.
    return "router" if "router" in modules else None
