"""Weights of a checkpoint folder from its safetensors headers, under the names and shapes they have in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft import _core
from moeft.families import Family
from moeft.families.disk_names import DiskNames, split
from moeft.planning.weights import Weight, component_of

FLOATS = {"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"}
PACKED_NAME = re.compile(r"(.+)\.(gate_up|down|weight)_nf4\.(packed|absmax|nested_absmax|nested_offset)")
TEXT_OUTSIDE = ("lm_head.",)  # text weights outside the text model of a multimodal checkpoint


def weights_from_headers(folder: Path, family: Family | None, config: Mapping[str, Any]) -> list[Weight]:
    """Read the headers of a folder, 16-bit or packed, with experts in one tensor or in one each.

    Raises:
        CheckpointError: If the checkpoint is incomplete or damaged.
        OSError: If a file cannot be read.
    """
    tensors = json.loads(_core.tensors(folder))
    names = {tensor["name"] for tensor in tensors}
    prefix = family.multimodal_prefix if family else None
    multimodal = prefix is not None and any(name.startswith(prefix) for name in names)
    single_experts = _SingleExperts(family)
    weights: list[Weight] = []
    for tensor in tensors:
        name, shape = tensor["name"], tuple(tensor["shape"])
        if name.startswith("lm_head.") and config.get("tie_word_embeddings"):
            continue
        packed = PACKED_NAME.fullmatch(name)
        if packed is not None:
            if packed[3] == "packed":
                weights.append(_packed_weight(packed[1], packed[2], shape, family, config))
            continue
        if single_experts.take(name, shape):
            continue
        name = single_experts.name_in_memory(name)
        tower = multimodal and not name.startswith((prefix or "", *TEXT_OUTSIDE))
        component = "towers" if tower else component_of(family, name)
        fixed = None if tensor["dtype"] in FLOATS else tensor["bytes"]
        weights.append(Weight(name, shape, component, fixed_bytes=fixed))
    return weights + single_experts.stacks()


def _packed_weight(
    module: str, weight: str, shape: tuple[int, ...], family: Family | None, config: Mapping[str, Any]
) -> Weight:
    """The weight behind packed codes: a file holds their number only, and the hidden size tells the other side."""
    hidden = int(config["hidden_size"])
    name = f"{module}.weight" if weight == "weight" else f"{module}.{weight}_proj"
    *stack, codes = shape
    other = 2 * codes // hidden
    from_hidden = not (weight == "down" or module.endswith((".o_proj", ".down_proj")))
    sides = (other, hidden) if from_hidden else (hidden, other)
    return Weight(name, (*stack, *sides), component_of(family, name), packed=True)


class _SingleExperts:
    """Collects experts that lie one by one on disk into the stacks that they become in memory."""

    def __init__(self, family: Family | None) -> None:
        self.family = family
        self.names = DiskNames(family)
        self.found: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor belongs to one expert; it is then remembered."""
        place = split(name)
        expert = self.names.expert(place[1]) if place else None
        if place is None or expert is None:
            return False
        self.found.setdefault((place[0], expert[0]), []).append(shape)
        return True

    def name_in_memory(self, name: str) -> str:
        """Name of a tensor that is no expert."""
        place = split(name)
        return name if place is None else f"{place[0]}.{self.names.in_memory(place[1])}"

    def stacks(self) -> list[Weight]:
        """``gate_up_proj`` and ``down_proj`` of every layer."""
        weights = []
        for (layer, part), shapes in sorted(self.found.items()):
            if part == "up":
                continue
            assert self.family is not None
            rows, columns = shapes[0]
            stack = "down_proj" if part == "down" else "gate_up_proj"
            rows *= 1 if part == "down" else 2
            name = f"{layer}.{self.family.experts}.{stack}"
            weights.append(Weight(name, (len(shapes), rows, columns), component_of(self.family, name)))
        return weights
