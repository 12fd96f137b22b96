"""Which trained parameters lie over which weight of a subspace file, and how.

Shapes: E experts, F outputs, K inputs, r rank of an adapter, k directions of the subspace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from moeft import families
from moeft.errors import CheckpointError
from moeft.integration import model_family
from moeft.kernels.experts.lora import split_a, split_b
from moeft.training.protection.files import SubspaceFile

View = Callable[[Tensor], Tensor]
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter over a weight ``W [F, K]`` or a stack ``[E, F, K]``.

    Attributes:
        name: Its own.
        parameter: A of a LoRA, B of one, or the weight itself.
        weight: Name of the weight in the file.
        layer: Decoder layer.
        sides: "U" if its rows are outputs, "V" if its columns are inputs, "UV" if both.
        view: Shows the parameter, or a tensor like it, as ``[rows, columns]`` or ``[E, rows, columns]``.
    """

    name: str
    parameter: nn.Parameter
    weight: str
    layer: int
    sides: str
    view: View


def trained_parameters(model: Any, file: SubspaceFile) -> list[TrainedParameter]:
    """Every trained matrix of a model.

    Biases, those of experts too, and the scales of norms have no place in a subspace of matrices and are left out.

    Raises:
        CheckpointError: If the file lacks the weight of one, or holds it in another shape.
        UnsupportedModelError: If the model's family is unknown.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = model_family.of_model(base)
    found = [*_factors(model, family, file), *_weights(model, family, file)]
    for trained in found:
        _check(trained, file)
    return found


def _factors(model: nn.Module, family: families.Family, file: SubspaceFile) -> Iterator[TrainedParameter]:
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = _canonical(path, family) + "." + getattr(module, "parameter_name", "weight")
        for factor, sides, split in (("lora_A", "V", split_a), ("lora_B", "U", split_b)):
            for adapter, linear in getattr(module, factor).items():
                if not linear.weight.requires_grad:
                    continue
                view: View = _same
                if len(file.shape(weight)) == 3:
                    view = partial(split, num_experts=module.num_experts if isinstance(module, ParamWrapper) else 1)
                name = f"{path}.{factor}.{adapter}.weight"
                yield TrainedParameter(name, linear.weight, weight, _layer(weight), sides, view)


def _weights(model: nn.Module, family: families.Family, file: SubspaceFile) -> Iterator[TrainedParameter]:
    for name, parameter in model.named_parameters():
        is_factor = ".lora_A." in name or ".lora_B." in name
        if not parameter.requires_grad or parameter.ndim < 2 or is_factor or name.endswith("bias"):
            continue
        weight = _canonical(name, family)
        turned = parameter.ndim == 3 and family.layout.transposed
        yield TrainedParameter(name, parameter, weight, _layer(weight), "UV", _turned if turned else _same)


def _check(trained: TrainedParameter, file: SubspaceFile) -> None:
    *stack, outputs, inputs = file.shape(trained.weight)
    *found_stack, rows, columns = trained.view(trained.parameter).shape
    wanted = {"U": (rows == outputs), "V": (columns == inputs), "UV": (rows, columns) == (outputs, inputs)}
    if stack != found_stack or not wanted[trained.sides]:
        raise CheckpointError(
            f"{trained.name} is {list(trained.parameter.shape)}, but {trained.weight} is {[*stack, outputs, inputs]} "
            f"in {file.path}; was the file made from this model?"
        )


def _canonical(name: str, family: families.Family) -> str:
    """Name in the text model alone, without wrappers."""
    name = model_family.name_in_base(name)
    prefix = family.multimodal_prefix
    return "model." + name.removeprefix(prefix) if prefix and name.startswith(prefix) else name


def _layer(weight: str) -> int:
    match = _LAYER.search(weight)
    if match is None:
        raise CheckpointError(f"{weight} is trained and in no decoder layer, so it cannot be protected; freeze it")
    return int(match[1])


def _same(t: Any) -> Any:
    return t


def _turned(t: Tensor) -> Tensor:
    return t.mT
