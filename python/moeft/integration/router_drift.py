"""How far training moved a router: its choices on the same rows, before and after.

Shapes: T tokens, k experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeft.integration.routing_statistics import each_choice

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerDrift:
    """Change of the routing of one layer.

    Attributes:
        layer: Decoder layer.
        agreement: Share of a token's experts that are chosen both times, mean over tokens; 1 is unchanged.
        same_first: Share of tokens whose first choice is the same.
        load_shift: Share of all choices that went to another expert in sum: total variation of the two loads.
        busiest_before: Load of the busiest expert over the mean, before.
        busiest_after: The same, after.
    """

    layer: int
    agreement: float
    same_first: float
    load_shift: float
    busiest_before: float
    busiest_after: float


@dataclass(frozen=True)
class RouterDrift:
    """Change of the routing of all layers.

    Attributes:
        tokens: Tokens that were compared.
        layers: One entry per layer with experts.
    """

    tokens: int
    layers: tuple[LayerDrift, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the means over layers."""
        means = {
            name: sum(getattr(layer, name) for layer in self.layers) / len(self.layers)
            for name in ("agreement", "same_first", "load_shift")
        }
        return {**means, **asdict(self)}


def routing_choices(model: PreTrainedModel | PeftModel, rows: Iterable[Sequence[int]]) -> dict[int, Tensor]:
    """Experts of every token of some rows: layer -> ``[T, k]`` int16, the largest weight first.

    Raises:
        ValueError: If there are no rows.
        UnsupportedModelError: If the model has no experts.
    """
    found: dict[int, list[Tensor]] = {}
    each_choice(model, rows, lambda layer, chosen: found.setdefault(layer, []).append(chosen.to("cpu", torch.int16)))
    return {layer: torch.cat(parts) for layer, parts in sorted(found.items())}


def router_drift(before: Mapping[int, Tensor], after: Mapping[int, Tensor], num_experts: int) -> RouterDrift:
    """Compare two results of :func:`routing_choices` on the same rows.

    Raises:
        ValueError: If layers or shapes differ.
    """
    shapes = [{layer: tuple(chosen.shape) for layer, chosen in side.items()} for side in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"routing before is of layers and shapes {shapes[0]}, after of {shapes[1]}; compare equal rows"
        )
    layers = tuple(_drift(layer, before[layer], after[layer], num_experts) for layer in sorted(before))
    return RouterDrift(next(iter(shapes[0].values()))[0], layers)


def _drift(layer: int, before_Tk: Tensor, after_Tk: Tensor, num_experts: int) -> LayerDrift:
    kept_T = (before_Tk[:, :, None] == after_Tk[:, None, :]).any(-1).double().mean(-1)
    loads = [torch.bincount(side.flatten().long(), minlength=num_experts).double() for side in (before_Tk, after_Tk)]
    before_E, after_E = (load / load.sum() for load in loads)
    return LayerDrift(
        layer,
        agreement=float(kept_T.mean()),
        same_first=float((before_Tk[:, 0] == after_Tk[:, 0]).double().mean()),
        load_shift=float((before_E - after_E).abs().sum() / 2),
        busiest_before=float(before_E.max() * num_experts),
        busiest_after=float(after_E.max() * num_experts),
    )
