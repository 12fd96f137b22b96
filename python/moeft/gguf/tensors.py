"""Which rows of a checkpoint each tensor of a GGUF file is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moeft.errors import CheckpointError
from moeft.families import Family
from moeft.families.disk_names import DiskNames
from moeft.gguf.architectures import Architecture

# Towers of a multimodal checkpoint, which become files of their own in llama.cpp.
TOWERS = re.compile(r"(^|\.)(vision|audio|multi_modal|embed_vision|embed_audio)")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor on disk; all axes but the last count rows."""

    tensor: str
    first_row: int
    rows: int


@dataclass
class Spec:
    """One tensor to be written: its name, shape (slowest axis first) and where its rows come from."""

    name: str
    shape: list[int]
    pieces: list[Piece] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    add: float = 0.0
    interleave: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for the Rust core."""
        return asdict(self)


class TensorNames:
    """Tensors of a checkpoint under llama.cpp's names.

    Args:
        architecture: The names.
        family: The family, for the experts' places on disk.
        shapes: Name on disk -> shape.
        head_dim: Values of a head, where heads are interleaved.
        tied: Whether the head is the embedding.
    """

    def __init__(
        self,
        architecture: Architecture,
        family: Family,
        shapes: Mapping[str, list[int]],
        head_dim: int,
        tied: bool,
    ) -> None:
        self.architecture, self.family, self.shapes = architecture, family, shapes
        self.names = DiskNames(family)
        self.head_dim, self.tied = head_dim, tied
        self.experts: dict[int, dict[str, dict[int, str]]] = {}

    def specs(self) -> list[Spec]:
        """Every tensor, embeddings first, then the layers in order.

        Raises:
            CheckpointError: If a tensor is unknown, or experts are missing.
        """
        plain = [spec for disk, shape in self.shapes.items() if (spec := self._plain(disk, shape)) is not None]
        stacks = [spec for layer in self.experts for spec in self._per_expert(layer)]
        return sorted([*plain, *stacks], key=lambda spec: _place(spec.name))

    def _plain(self, disk: str, shape: list[int]) -> Spec | None:
        memory = self._in_memory(disk)
        if memory is None or (memory == "lm_head.weight" and self.tied):
            return None
        rows = _rows(shape)
        match = LAYER.fullmatch(memory)
        if match is None:
            name = self.architecture.tensors.get(memory)
            return self._spec(name, memory, disk, shape, [Piece(disk, 0, rows)])
        layer, below = int(match[1]), self.names.in_memory(match[2])
        if below in self.architecture.layer:
            name = f"blk.{layer}.{self.architecture.layer[below]}"
            return self._spec(name, below, disk, shape, [Piece(disk, 0, rows)])
        stack = self._stack(below)
        if stack == "down":
            return Spec(f"blk.{layer}.{self.architecture.experts['down']}", shape, [Piece(disk, 0, rows)])
        if stack == "gate_up":
            self.experts.setdefault(layer, {})["fused"] = {0: disk}
            return None
        if expert := self.names.expert(match[2]):
            self.experts.setdefault(layer, {}).setdefault(expert[0], {})[expert[1]] = disk
            return None
        return self._spec(None, below, disk, shape, [])

    def _spec(self, name: str | None, below: str, disk: str, shape: list[int], pieces: list[Piece]) -> Spec:
        if name is None:
            raise CheckpointError(
                f"{disk} has no place in a GGUF file of {self.architecture.name}; is config.json of this model?"
            )
        offset = self.architecture.norm_offset if name.endswith("norm.weight") else 0.0
        head = self.head_dim if below in self.architecture.interleaved else None
        return Spec(name, shape, pieces, add=offset, interleave=head)

    def _in_memory(self, disk: str) -> str | None:
        """A name as the text model has it in memory; None for other towers and buffers."""
        for prefix in (self.family.disk_prefix, self.family.multimodal_prefix):
            if prefix and disk.startswith(prefix):
                return "model." + disk.removeprefix(prefix)
        disk = disk.removeprefix("language_model.") if disk.startswith("language_model.lm_head") else disk
        return None if TOWERS.search(disk) or disk.endswith("rotary_emb.inv_freq") else disk

    def _stack(self, below: str) -> str | None:
        """``"gate_up"`` or ``"down"`` if the name is that of a fused stack."""
        module, _, parameter = below.rpartition(".")
        known = {"gate_up_proj": "gate_up", "down_proj": "down"}
        return known.get(parameter) if self.family.experts and module == self.family.experts else None

    def _per_expert(self, layer: int) -> Iterator[Spec]:
        found, names = self.experts[layer], self.architecture.experts
        if "fused" in found:
            disk = found["fused"][0]
            count, both, width = self.shapes[disk]
            half = both // 2
            if "gate_up" in names:
                yield Spec(f"blk.{layer}.{names['gate_up']}", [count, both, width], [Piece(disk, 0, count * both)])
                return
            for start, projection in ((0, "gate"), (half, "up")):
                pieces = [Piece(disk, expert * both + start, half) for expert in range(count)]
                yield Spec(f"blk.{layer}.{names[projection]}", [count, half, width], pieces)
            return
        numbers = {tuple(sorted(found.get(projection, {}))) for projection in ("gate", "up", "down")}
        experts = next(iter(numbers))
        if len(numbers) > 1 or experts != tuple(range(len(experts))):
            raise CheckpointError(f"experts of layer {layer} are missing from the checkpoint; copy it again")
        groups = [("gate", "up")] if "gate_up" in names else [("gate",), ("up",)]
        for group in [*groups, ("down",)]:
            pieces = [
                Piece(disk := found[projection][expert], 0, _rows(self.shapes[disk]))
                for expert in experts
                for projection in group
            ]
            rows, width = sum(piece.rows for piece in pieces), self.shapes[pieces[0].tensor][-1]
            name = names["gate_up" if len(group) == 2 else group[0]]
            yield Spec(f"blk.{layer}.{name}", [len(experts), rows // len(experts), width], pieces)


def _rows(shape: list[int]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _place(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)
