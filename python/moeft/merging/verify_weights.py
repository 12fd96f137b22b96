"""Proof about every tensor of a merged checkpoint: copied ones to the last bit, computed ones against float64.

Tensors are read one at a time and computed in slabs: memory is bounded by the largest tensor for the methods that need
angles of whole tensors, and by a slab for the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeft.errors import UnsupportedModelError
from moeft.families import Family, for_model_type
from moeft.merging import plan
from moeft.merging.formulas import FORMULAS, Terms, bound, count_roundings
from moeft.merging.settings import Recipe, layer_of
from moeft.merging.tensors import AdapterDeltas, DiskTensors, same_bytes
from moeft.merging.verify import Proof

SLAB_LEN = 1 << 24
"""Values that are computed at once: 128 MiB in float64, some ten times."""
WHOLE = ("slerp", "model_stock")
"""Methods that must see a whole unit."""


def prove_weights(recipe: Path, merged: Path, show: Callable[[str], None] = print) -> list[Proof]:
    """Check every tensor of a merge against its inputs.

    Args:
        recipe: The recipe file it was made with.
        merged: The merged checkpoint.
        show: Where to print what is not checked.

    Raises:
        MoeftError: If the recipe or its inputs cannot be used.
    """
    return _Check(recipe, merged).prove(show)


class _Check:
    def __init__(self, recipe: Path, merged: Path) -> None:
        content, folder = Recipe.read(recipe)
        self.planned = {tensor["name"]: tensor for tensor in plan(recipe)["tensors"]}
        layers = [layer for name in self.planned if (layer := layer_of(name)) is not None]
        self.recipe = Recipe(content, folder, max(layers, default=-1) + 1)
        self.merged = DiskTensors(merged)
        self.base = DiskTensors(self.recipe.base)
        self.family = _family(self.recipe.base)
        self.sources = [self._open(entry) for entry in self.recipe.models]
        self.fisher = DiskTensors(self.recipe.path(content["fisher"])) if "fisher" in content else None
        self.importance = self._layer_importance()

    def prove(self, show: Callable[[str], None]) -> list[Proof]:
        """Names and copies, then values, if any can be computed here."""
        method = self.recipe.method
        strange = self.planned.keys() ^ self.merged.names
        copies = [name for name, tensor in self.planned.items() if tensor["action"] == "copy" and name not in strange]
        changed = sum(not self._is_copied(name) for name in copies)
        computed = [name for name in self.planned if name not in strange and name not in copies]
        farthest, where, checked = 0.0, "", 0
        for name in computed:
            apart = self._apart(name)
            if apart is not None:
                checked += 1
                if apart >= farthest:
                    farthest, where = apart, name
        names = "what the recipe makes of its inputs"
        proofs = [
            Proof("the merge has the tensors of its base", len(strange), 0, "names missing or new", names),
            Proof("untouched tensors are those of the base", changed, 0, "tensors changed", "none may change"),
        ]
        why = f"; what {method} drops hangs on single roundings or on chance" if method not in FORMULAS else ""
        if computed and not checked:
            show(f"values were not computed again in float64: none of {len(computed)} computed tensors can be{why}")
            return proofs
        how = "half a step of the output's type, and half a step of float32 for every rounding on the way"
        how += f"; {checked} of {len(computed)} computed tensors, farthest {where or 'none'}"
        values = "computed tensors equal a float64 computation, rounded once"
        return [*proofs, Proof(values, farthest, 1, "of the bound", how)]

    def _is_copied(self, name: str) -> bool:
        base, found = self.base.read(name), self.merged.read(name)
        return same_bytes(base.to(found.dtype) if base.is_floating_point() else base, found)

    def _apart(self, name: str) -> float | None:
        """Largest distance of a tensor from float64, in bounds; None if it cannot be computed here."""
        formula = FORMULAS.get(self.recipe.method)
        found = _with_an_axis(self.merged.read(name))
        if formula is None or self.recipe.content.get("rounding") == "peft" or not found.is_floating_point():
            return None
        farthest = 0.0
        for rows in self._slabs(tuple(found.shape)):
            made = self._terms(name, tuple(found.shape), rows)
            if made is None:
                return None
            terms, roundings = made
            result, magnitude = formula(terms)
            apart = (found[rows].double() - result).abs() / bound(result, magnitude, found.dtype, roundings)
            # A value that is not a number is farther than any bound.
            apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
            farthest = max(farthest, apart.max().item() if apart.numel() else 0.0)
        return farthest

    def _slabs(self, shape: tuple[int, ...]) -> Iterator[slice]:
        """Ranges of the first axis, with whole units where the method needs them."""
        rows = shape[0]
        row_len = max(1, torch.Size(shape[1:]).numel())
        step = max(1, SLAB_LEN // row_len)
        if self.recipe.method in WHOLE and not (len(shape) == 3 and self._unit(shape, "") == "expert"):
            step = rows
        return (slice(start, start + step) for start in range(0, rows, max(1, step)))

    def _unit(self, shape: tuple[int, ...], name: str) -> str:
        if self.recipe.method == "model_stock":
            return "row" if self.recipe.value("filter_wise", name, False) else "tensor"
        return str(self.recipe.value("unit", name, "expert"))

    def _terms(self, name: str, shape: tuple[int, ...], rows: slice) -> tuple[Terms, int] | None:
        if name not in self.base:
            return None
        recipe = self.recipe
        base = _with_an_axis(self.base.read(name))[rows].double()
        models, deltas, sizes, weights, ranks = [], [], [], [], []
        total = 0.0
        for entry, source in zip(recipe.models, self.sources, strict=True):
            weight = float(recipe.value("weight", name, 1.0, entry))
            total += weight
            if str(recipe.path(entry.get("adapter", entry.get("model")))) not in self.planned[name]["inputs"]:
                if recipe.method == "linear":
                    return None
                continue
            read = self._read(source, name, shape, rows, base)
            if read is None:
                return None
            model, delta, size, rank = read
            models.append(model)
            deltas.append(delta)
            sizes.append(size)
            weights.append(weight)
            ranks.append(rank)
        unit = self._unit(shape, name)
        parts = {"row": base.numel() // max(1, shape[-1]), "expert": base.shape[0]}
        own = recipe.models[0] if recipe.method == "passthrough" else None
        terms = Terms(
            base=base,
            models=models,
            deltas=deltas,
            delta_magnitudes=sizes,
            weights=weights,
            total_weight=total,
            scale=float(recipe.value("scale", name, 1.0, own)),
            normalize=bool(recipe.value("normalize", name, recipe.method in ("linear", "fisher_damped"))),
            t=float(recipe.value("t", name, 0.0)),
            units=parts.get(unit, 1) if len(shape) == 3 or (unit == "row" and len(shape) > 1) else 1,
            damping=self._damping(name, rows),
        )
        return terms, count_roundings(len(models), ranks)

    def _read(
        self, source: DiskTensors | AdapterDeltas, name: str, shape: tuple[int, ...], rows: slice, base: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int] | None:
        """A model's weights, its delta, what the delta was computed from, and its rank."""
        if isinstance(source, AdapterDeltas):
            found = source.delta(name, shape, rows) if source.is_uniform else None
            return None if found is None else (base + found[0], *found)
        if name not in source:
            return None
        tensor = _with_an_axis(source.read(name))
        if tuple(tensor.shape) != shape:
            return None
        model = tensor[rows].double()
        return model, model - base, model.abs() + base.abs(), 0

    def _damping(self, name: str, rows: slice) -> Tensor | float:
        """``(1 - F) * (1 - F_layer)`` of ``fisher_damped``."""
        layer = layer_of(name)
        of_layer = 1.0 - (self.importance.get(layer, 0.0) if layer is not None else 0.0)
        if self.fisher is None or name not in self.fisher:
            return of_layer
        values = _with_an_axis(self.fisher.read(name))
        low, high = values.min().double(), values.max().double()
        if not low < high:
            return of_layer
        return of_layer * (1.0 - (values[rows].double() - low) / (high - low))

    def _layer_importance(self) -> Mapping[int, float]:
        file = self.recipe.content.get("layer_importance")
        if file is None:
            return {}
        raw = json.loads(self.recipe.path(file).read_text("utf-8"))["layers"]
        low, high = min(raw.values()), max(raw.values())
        scaled = {int(layer): (value - low) / (high - low) if high > low else 0.0 for layer, value in raw.items()}
        missing = self.recipe.content.get("missing_layers", 0.0)
        return {layer: scaled.get(layer, missing) for layer in range(self.recipe.num_layers)}

    def _open(self, entry: Mapping[str, Any]) -> DiskTensors | AdapterDeltas:
        if "adapter" in entry:
            return AdapterDeltas(self.recipe.path(entry["adapter"]), self.family)
        return DiskTensors(self.recipe.path(entry["model"]))


def _with_an_axis(tensor: Tensor) -> Tensor:
    """A tensor that is a single number as a vector of one, others as they are."""
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _family(base: Path) -> Family | None:
    """Family of a checkpoint; None if it has no config, or one of an unknown ``model_type``."""
    try:
        return for_model_type(json.loads((base / "config.json").read_text("utf-8"))["model_type"])
    except (OSError, KeyError, UnsupportedModelError):
        return None
