"""What an adapter needs to know of its base: family, number of experts, sizes of the stacks. Reads headers only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft import _core, families
from moeft.errors import AdapterError


@dataclass(frozen=True)
class Base:
    """A 16- or 32-bit checkpoint with experts.

    Attributes:
        path: Its folder.
        family: Its family.
        num_experts: Experts per layer.
        sizes: Stack -> (outputs, inputs) of one expert.
        transposed: Whether its stacks are ``[E, in, out]``. PEFT never took those for the other way round.
    """

    path: Path
    family: families.Family
    num_experts: int
    sizes: dict[str, tuple[int, int]]
    transposed: bool = False

    @classmethod
    def read(cls, path: str | Path) -> Base:
        """Read a checkpoint folder.

        Raises:
            AdapterError: If it has no expert weights that can be read.
            UnsupportedModelError: If its family is unknown.
            CheckpointError: If it is incomplete or damaged.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise AdapterError(f"{path / 'config.json'} does not exist; expected the folder of the base checkpoint")
        config: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
        family = families.for_model_type(config["model_type"])
        shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in json.loads(_core.tensors(str(path)))}
        found = _fused(shapes, family) or _per_expert(shapes, family)
        if found is None:
            raise AdapterError(
                f"{path} has no expert weights of family {family.name}; give the 16-bit base, not a packed checkpoint"
            )
        return cls(path, family, *found)

    def fingerprint(self) -> str:
        """Fingerprint of the base, as adapters carry it."""
        return _core.fingerprint(str(self.path))


def expert_names(family: families.Family) -> list[str]:
    """Names on disk of one expert's gate, up and down below a decoder layer, ``{e}`` the expert; none if fused."""
    return [family.disk[projection] for projection in ("gate", "up", "down") if projection in family.disk]


Found = tuple[int, dict[str, tuple[int, int]], bool] | None


def _fused(shapes: dict[str, tuple[int, ...]], family: families.Family) -> Found:
    stacks = {
        stack: next((s for n, s in shapes.items() if n.endswith(f".{family.experts}.{stack}") and len(s) == 3), None)
        for stack in ("gate_up_proj", "down_proj")
    }
    gate_up, down = stacks["gate_up_proj"], stacks["down_proj"]
    if gate_up is None or down is None:
        return None
    num_experts, rows, columns = gate_up
    # [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]: no sizes fit both.
    if (rows, columns) == (2 * down[2], down[1]):
        return num_experts, {"gate_up_proj": (rows, columns), "down_proj": (down[1], down[2])}, False
    if (columns, rows) == (2 * down[1], down[2]):
        return num_experts, {"gate_up_proj": (columns, rows), "down_proj": (down[2], down[1])}, True
    return None


def _per_expert(shapes: dict[str, tuple[int, ...]], family: families.Family) -> Found:
    names = [re.escape(name).replace(r"\{e\}", r"(\d+)") for name in expert_names(family)]
    if not names:
        return None
    gate, _, down = names
    numbers, sizes = set(), {}
    for name, shape in shapes.items():
        if match := re.search(rf"\.{gate}$", name):
            numbers.add(int(match[1]))
            sizes["gate_up_proj"] = (2 * shape[0], shape[1])
        elif re.search(rf"\.{down}$", name):
            sizes["down_proj"] = (shape[0], shape[1])
    return (max(numbers) + 1, sizes, False) if len(sizes) == 2 else None
