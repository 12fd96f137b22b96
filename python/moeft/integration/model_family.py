"""The family of a model: from its file, or for a ``model_type`` without one from the experts modules it has."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from moeft import families
from moeft.errors import UnsupportedModelError
from moeft.integration import experts_module
from moeft.modules import NF4Experts, NF4Linear

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYER = re.compile(r"((?:.*\.)?layers)\.\d+\.(.+)")
MLP = ("gate_proj", "up_proj", "down_proj")
logger = logging.getLogger(__name__)


def of_model(model: Any) -> families.Family:
    """The family of a transformers model, packed or not, with or without PEFT's wrappers.

    A model of no known family is taken by the attributes of its experts: attention is then every ``self_attn.*_proj``,
    mlp every ``gate_proj``, ``up_proj`` and ``down_proj`` outside the experts. A line in the log says so once.

    Raises:
        UnsupportedModelError: If the family is unknown and there are no fused experts, or they lie in several places.
    """
    model_type = model.config.model_type
    try:
        return families.for_model_type(model_type)
    except UnsupportedModelError:
        family = _by_attributes(model, model_type)
        if family is None:
            raise
        _say_once(model_type, f"{family.layers}.*.{family.experts}")
        return family


def name_in_base(path: str) -> str:
    """Module path without the wrappers of PEFT."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def _by_attributes(model: nn.Module, model_type: str) -> families.Family | None:
    places: dict[tuple[str, str], families.StackLayout] = {}
    linears: dict[str, set[str]] = {"attention": set(), "mlp": set(), "router": set()}
    for layers, below, module in _modules_in_layers(model):
        if isinstance(module, NF4Experts):
            places[layers, below] = families.StackLayout(*module.layout, module.gate_up_proj_bias is not None)
        elif experts_module.is_fused(module):
            spec = experts_module.read(f"{layers}.*.{below}", module)
            places[layers, below] = families.StackLayout(*spec.layout, spec.biased)
        elif isinstance(module, nn.Linear | NF4Linear):
            parent, _, linear = below.rpartition(".")
            if parent == "self_attn" and linear.endswith("_proj"):
                linears["attention"].add(below)
            elif linear in MLP:
                linears["mlp"].add(below)
    if len(places) != 1:
        return None
    ((layers, experts), layout) = next(iter(places.items()))
    return families.Family(
        name=model_type,
        model_types=(model_type,),
        layers=layers,
        multimodal_prefix=None,
        disk_prefix=None,
        text_class=None,
        config={},
        experts=experts,
        linears={component: tuple(sorted(paths)) for component, paths in linears.items()},
        layout=layout,
    )


def _modules_in_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Path of the layers, path below a layer, and module."""
    for path, module in model.named_modules():
        if match := LAYER.fullmatch(name_in_base(path)):
            yield match[1], match[2], module


@functools.cache
def _say_once(model_type: str, experts: str) -> None:
    logger.warning(
        "model_type %r has no family file, so its experts (%s) are taken as their attributes in transformers say; "
        "check the audit and the first losses",
        model_type,
        experts,
    )
