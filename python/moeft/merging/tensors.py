"""Tensors of checkpoints and deltas of adapters by their names on disk, one at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_EXPERT = re.compile(r"(?P<layer>layers\.\d+\.).*\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


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
    """

    def __init__(self, path: Path) -> None:
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
        expert = _EXPERT.fullmatch(_below_layers(name))
        if expert is not None:
            return self._expert_delta(expert, shape, rows)
        key = self._key(_below_layers(name.removesuffix(".weight")))
        if key is None:
            return None
        experts = shape[0] if len(shape) == 3 else 1
        a, b = self._factors(key, experts)
        if len(shape) == 3:
            a, b = a[rows], b[rows]
        elif (b.shape[1], a.shape[2]) == shape:
            b = b[:, rows]
        delta, size, rank = self._product(a, b)
        if len(shape) == 3 and delta.shape[1:] == (shape[2], shape[1]):
            delta, size = delta.mT, size.mT
        if len(shape) == 2:
            delta, size = delta[0], size[0]
        return (delta, size, rank) if delta.shape[1:] == shape[1:] else None

    def _expert_delta(
        self, found: re.Match[str], shape: tuple[int, ...], rows: slice
    ) -> tuple[Tensor, Tensor, int] | None:
        """Of an expert that is a matrix on disk and part of a stack in memory, gate before up."""
        part = _PARTS.get(found["part"])
        stacks = [path for path in self._keys if path.startswith(found["layer"]) and ".experts" in path]
        stacks = [path for path in stacks if path.endswith((".experts", ".experts.base_layer"))]
        inner = [path for path in stacks if path.endswith(".base_layer")]
        # PEFT wraps gate and up first, so with both stacks these are the inner ones.
        chosen = inner if inner and part != "down" else [path for path in stacks if path not in inner]
        if part is None or len(chosen) != 1:
            return None
        key = self._keys[chosen[0]]
        a, b = self._factors(key, self._weights.shape(f"{key}.lora_A.weight")[0] // int(self._config["r"]))
        a, b = a[int(found["expert"])][None], b[int(found["expert"])][None]
        if part != "down":
            b = b.chunk(2, dim=1)[part == "up"]
        delta, size, rank = self._product(a, b[:, rows])
        return (delta[0], size[0], rank) if delta.shape[2:] == shape[1:] and b.shape[1] == shape[0] else None

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
        stack, _, leaf = module.rpartition(".")
        if module not in self._keys and leaf in ("gate_up_proj", "down_proj") and stack.endswith("experts"):
            inner = f"{stack}.base_layer"
            module = inner if leaf == "gate_up_proj" and inner in self._keys else stack
        return self._keys.get(module)


def _below_layers(name: str) -> str:
    """A path from the decoder layers on: what stands in front differs between a text model and a multimodal one."""
    return name[name.find("layers.") :] if "layers." in name else name.removeprefix("base_model.model.")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, of type and shape too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
