"""Tensors of checkpoints and deltas of adapters by their names on disk, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeft.families import Family
from moeft.families.disk_names import PARTS, DiskNames, split


class DiskTensors:
    """A checkpoint folder, or one file, of which one tensor at a time is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        self._files: list[Any] = [safe_open(file, "pt") for file in files]
        self._places = {name: file for file in self._files for name in list(file.keys())}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> set[str]:
        """All names."""
        return set(self._places)

    def read(self, name: str) -> Tensor:
        """A tensor as it is."""
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return tuple(self._places[name].get_slice(name).get_shape())


class AdapterDeltas:
    """A LoRA adapter in PEFT's layout: its delta of any weight, in float64.

    Source: PEFT 0.21, ``ParamWrapper.get_delta_weight``: A is ``(E*r, in)`` with row ``e*r + j``, B ``(out, r*E)`` with
    column ``j*E + e``.

    Args:
        path: Folder of the adapter.
        family: Family of the base, which says how experts lie; None for one that is unknown: then names on disk are
            those in memory, and stacks lie as ``[E, out, in]``.
    """

    def __init__(self, path: Path, family: Family | None) -> None:
        self._names = DiskNames(family)
        self._transposed = family is not None and family.layout.transposed
        self._config = json.loads((path / "adapter_config.json").read_text("utf-8"))
        self._weights = DiskTensors(path / "adapter_model.safetensors")
        self._keys = {}
        for key in self._weights.names:
            module, found, rest = key.partition(".lora_A.")
            if found and rest == "weight":
                self._keys[_below_layers(module)] = module

    @property
    def is_uniform(self) -> bool:
        """Whether all deltas are products at one scale; of other adapters nothing is computed here."""
        config = self._config
        patterns = config.get("rank_pattern") or config.get("alpha_pattern")
        return not patterns and not config.get("use_dora") and config.get("bias", "none") == "none"

    def delta(self, name: str, shape: tuple[int, ...], rows: slice) -> tuple[Tensor, Tensor, int] | None:
        """Rows of the delta of a weight on disk, along the first axis: of a matrix, a stack, or one expert's matrix.

        Returns:
            The delta, the sum of the magnitudes of its terms, and its rank; None if the adapter has nothing for the
            weight, or nothing of its shape.
        """
        layer, below = split(_below_layers(name)) or (None, name)
        expert = self._names.expert(below)
        if layer is not None and expert is not None:
            return self._expert_delta(layer, *expert, shape, rows)
        in_memory = self._names.in_memory(below).removesuffix(".weight")
        key = self._key(in_memory if layer is None else f"{layer}.{in_memory}")
        if key is None:
            return None
        if len(shape) == 2:
            a, b = self._factors(key, 1)
            delta, size, rank = self._product(a, b[:, rows])
            return (delta[0], size[0], rank) if (b.shape[1], a.shape[2]) == shape else None
        a, b = self._factors(key, shape[0])
        delta, size, rank = self._product(a[rows], b[rows])
        if self._transposed:
            delta, size = delta.mT, size.mT
        return (delta, size, rank) if delta.shape[1:] == shape[1:] else None

    def _expert_delta(
        self, layer: str, part: str, expert: int, shape: tuple[int, ...], rows: slice
    ) -> tuple[Tensor, Tensor, int] | None:
        """Of an expert that is a matrix on disk and part of a stack in memory, gate before up."""
        stack = next(name for name, parts in PARTS.items() if part in parts)
        experts = {path.removesuffix(".base_layer") for path in self._keys if path.startswith(f"{layer}.")}
        found = [path for path in experts if path.endswith(".experts")]
        key = self._key(f"{found[0]}.{stack}") if len(found) == 1 else None
        if key is None:
            return None
        a, b = self._factors(key, self._weights.shape(f"{key}.lora_A.weight")[0] // int(self._config["r"]))
        a, b = a[expert][None], b[expert][None]
        if stack == "gate_up_proj":
            b = b.chunk(2, dim=1)[PARTS[stack].index(part)]
        delta, size, rank = self._product(a, b[:, rows])
        return (delta[0], size[0], rank) if (b.shape[1], a.shape[2]) == shape else None

    def _factors(self, key: str, experts: int) -> tuple[Tensor, Tensor]:
        """A as ``[E, r, in]`` and B as ``[E, out, r]``."""
        a, b = (self._weights.read(f"{key}.lora_{part}.weight").double() for part in "AB")
        rank = a.shape[0] // experts
        return a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)

    def _product(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
        rank = a.shape[1]
        scale = float(self._config["lora_alpha"]) / (rank**0.5 if self._config.get("use_rslora") else rank)
        return scale * (b @ a), abs(scale) * (b.abs() @ a.abs()), rank

    def _key(self, module: str) -> str | None:
        """Of a module, or of the stack that a parameter of an experts module is.

        PEFT wraps gate and up first, so with both stacks these are the inner ones.
        """
        experts, _, stack = module.rpartition(".")
        if module not in self._keys and stack in PARTS and experts.endswith("experts"):
            inner = f"{experts}.base_layer"
            module = inner if stack == "gate_up_proj" and inner in self._keys else experts
        return self._keys.get(module)


def _below_layers(name: str) -> str:
    """A path from the decoder layers on: what stands in front differs between a text model and a multimodal one."""
    return name[name.find("layers.") :] if "layers." in name else name.removeprefix("base_model.model.")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, of type and shape too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
