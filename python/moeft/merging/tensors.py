"""Tensors of checkpoints and deltas of adapters by their names on disk, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


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
        """Rows of the delta of a weight on disk, along the first axis.

        Returns:
            The delta, the sum of the magnitudes of its terms, and its rank; None if the adapter has nothing for the
            weight, or nothing of its shape.
        """
        key = self._key(name)
        if key is None:
            return None
        a, b = (self._weights.read(f"{key}.lora_{part}.weight").double() for part in "AB")
        experts = shape[0] if len(shape) == 3 else 1
        rank = a.shape[0] // experts
        a = a.reshape(experts, rank, -1)
        b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
        if len(shape) == 3:
            a, b = a[rows], b[rows]
        elif (b.shape[1], a.shape[2]) == shape:
            b = b[:, rows]
        scale = float(self._config["lora_alpha"]) / (rank**0.5 if self._config.get("use_rslora") else rank)
        delta, size = scale * (b @ a), abs(scale) * (b.abs() @ a.abs())
        if len(shape) == 3 and delta.shape[1:] == (shape[2], shape[1]):
            delta, size = delta.mT, size.mT
        if len(shape) == 2:
            delta, size = delta[0], size[0]
        return (delta, size, rank) if delta.shape[1:] == shape[1:] else None

    def _key(self, name: str) -> str | None:
        module = _below_layers(name.removesuffix(".weight"))
        stack, _, leaf = module.rpartition(".")
        if module not in self._keys and leaf in ("gate_up_proj", "down_proj") and stack.endswith("experts"):
            # PEFT wraps gate and up first, so with both stacks these are the inner ones.
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
