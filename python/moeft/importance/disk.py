"""Which tensors of a checkpoint on disk hold the weights of its decoder layers. Reads headers only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moeft import _core, families
from moeft.errors import CheckpointError
from moeft.families.disk_names import PARTS, DiskNames

_PACKED = re.compile(r"(.+\.)(?:(gate_up|down)_nf4|weight_nf4)\.packed")


@dataclass(frozen=True)
class DiskWeight:
    """A linear layer's weight, or a stack of experts, on a 16-bit disk.

    Attributes:
        name: In memory, of the text model alone: ``model.layers.0.self_attn.q_proj.weight``.
        layer: Decoder layer.
        tensors: Names on disk: one; or one per expert and part, where experts lie one by one (all parts of the first
            expert, then those of the second).
        experts: Experts of a stack that lie one by one; None for a weight that is one tensor.
    """

    name: str
    layer: int
    tensors: tuple[str, ...]
    experts: int | None = None

    def split(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Tensor by tensor, a value in the shape that the weight has in memory."""
        if self.experts is None:
            yield self.tensors[0], value
            return
        parts = len(self.tensors) // self.experts
        for index, name in enumerate(self.tensors):
            yield name, value[index // parts].chunk(parts)[index % parts]


class Disk:
    """The decoder weights of a checkpoint folder, 16-bit or packed.

    Attributes:
        path: The folder.
        family: Its family.
        weights: Name in memory -> where it is on disk; of a packed checkpoint, on that of the base it was made from.

    Args:
        path: The folder.

    Raises:
        CheckpointError: If it is incomplete or damaged, or experts are missing.
        UnsupportedModelError: If no family file knows its ``model_type``: names on disk are the family's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{path} holds no config.json; give the folder of a checkpoint")
        config = json.loads((self.path / "config.json").read_text("utf-8"))
        self.family = families.for_model_type(config["model_type"])
        listed = json.loads(_core.tensors(str(self.path)))
        self.shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in listed}
        self.files = {tensor["name"]: tensor["file"] for tensor in listed}
        self._names = DiskNames(self.family)
        prefix = self.family.disk_prefix
        self._prefix = prefix if prefix and any(name.startswith(prefix) for name in self.shapes) else "model."
        self.weights = {weight.name: weight for weight in self._find()}

    def canonical(self, name: str) -> str:
        """Name in the text model alone of a weight in a model that may be multimodal."""
        prefix = self.family.multimodal_prefix
        return "model." + name.removeprefix(prefix) if prefix and name.startswith(prefix) else name

    def component(self, name: str) -> str:
        """Component of a weight by its name in memory: "experts", "attention", "mlp", ..."""
        return self.family.component(name)

    def _find(self) -> Iterator[DiskWeight]:
        single: dict[tuple[str, str], set[int]] = {}
        for name, shape in self.shapes.items():
            match = re.match(rf"{re.escape(self._prefix)}layers\.(\d+)\.(.+)", name)
            if match is None:
                continue
            layer, below = int(match[1]), match[2]
            if expert := self._names.expert(below):
                single.setdefault((match[1], expert[0]), set()).add(expert[1])
            elif packed := _PACKED.fullmatch(below):
                yield self._packed(layer, packed[1], packed[2], shape)
            else:
                weight = self._plain(name, layer, below, shape)
                if weight is not None:
                    yield weight
        yield from self._single(single)

    def _plain(self, name: str, layer: int, below: str, shape: tuple[int, ...]) -> DiskWeight | None:
        below = self._names.in_memory(below)
        in_memory = f"{self.family.layers}.{layer}.{below}"
        component = self.component(in_memory)
        if component == "experts" and len(shape) == 3:
            return DiskWeight(in_memory, layer, (name,))
        is_linear = component in ("attention", "mlp") and below.endswith(".weight") and len(shape) == 2
        return DiskWeight(in_memory, layer, (name,)) if is_linear else None

    def _packed(self, layer: int, module: str, stack: str | None, shape: tuple[int, ...]) -> DiskWeight:
        below = module + ("weight" if stack is None else f"{stack}_proj")
        in_memory = f"{self.family.layers}.{layer}.{below}"
        if stack is not None and self.family.disk.get("experts") == "per_expert":
            return self._of_single(in_memory, layer, shape[0])
        tensor = f"{self._prefix}layers.{layer}.{self._names.on_disk(below)}"
        return DiskWeight(in_memory, layer, (tensor,))

    def _single(self, found: dict[tuple[str, str], set[int]]) -> Iterator[DiskWeight]:
        for layer in sorted({layer for layer, _ in found}, key=int):
            numbers = set().union(*(found.get((layer, part), set()) for part in ("gate", "up", "down")))
            for stack, parts in PARTS.items():
                for part in parts:
                    if missing := sorted(set(range(max(numbers) + 1)) - found.get((layer, part), set())):
                        raise CheckpointError(
                            f"{self.path}: layer {layer} lacks the {part} projection of expert {missing[0]}; "
                            "is the download complete?"
                        )
                name = f"{self.family.layers}.{layer}.{self.family.experts}.{stack}"
                yield self._of_single(name, int(layer), len(numbers))

    def _of_single(self, name: str, layer: int, experts: int) -> DiskWeight:
        names = self._names.of_stack(name.rpartition(".")[2], experts)
        tensors = tuple(f"{self._prefix}layers.{layer}.{below}" for below in names)
        return DiskWeight(name, layer, tensors, experts)
