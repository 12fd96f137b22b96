"""A PEFT adapter folder: its config, its header, its pairs of factors by what they adapt."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft import _core, families
from moeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "moeft.base_fingerprint"
STACKS = ("gate_up_proj", "down_proj")

_FACTOR = re.compile(r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Pair:
    """Keys of the two factors of one linear layer, of one stack of experts, or of one expert's projection."""

    name: str  # "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"
    a: str
    b: str


class AdapterFolder:
    """An adapter on disk.

    Args:
        path: The folder, with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: If a file is missing, the config is no LoRA config, or factors of experts come without a partner.
        CheckpointError: If the file of factors is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for name in (CONFIG, WEIGHTS):
            if not (self.path / name).is_file():
                raise AdapterError(f"{self.path / name} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}")
        try:
            self.config: dict[str, Any] = json.loads((self.path / CONFIG).read_text("utf-8"))
            kind, self.rank = self.config["peft_type"], int(self.config["r"])
            self.alpha = float(self.config["lora_alpha"])
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{self.path / CONFIG} is no LoRA config: {type(error).__name__} {error}") from error
        if kind != "LORA":
            raise AdapterError(f"{self.path / CONFIG}: peft_type is {kind!r}, expected 'LORA'")
        listed = json.loads(_core.tensors(str(self.path / WEIGHTS)))
        self.shapes: dict[str, tuple[int, ...]] = {tensor["name"]: tuple(tensor["shape"]) for tensor in listed}
        self.dtypes: dict[str, str] = {tensor["name"]: tensor["dtype"] for tensor in listed}

    @cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path / WEIGHTS, "pt")

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Metadata in the header of the file of factors."""
        return dict(self._file.metadata() or {})

    def tensor(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._file.get_tensor(key)

    @cached_property
    def _modules(self) -> dict[str, dict[int, dict[str, str]]]:
        """Module -> depth of nesting -> "A" and "B" -> key."""
        modules: dict[str, dict[int, dict[str, str]]] = {}
        for key in self.shapes:
            match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
            if match:
                depth = match["nested"].count(".base_layer")
                modules.setdefault(match["module"], {}).setdefault(depth, {})[match["factor"]] = key
        return modules

    @cached_property
    def stacks(self) -> list[Pair]:
        """Pairs of expert stacks, in the order of their names.

        The name of a stack is not in the key: of the parameters that ``target_parameters`` name, the last one is the
        outermost wrapper, and each earlier one lies one ``base_layer`` deeper.
        """
        pairs = []
        for module, depths in self._modules.items():
            if not module.endswith(_EXPERTS_ENDS):
                continue
            targeted = [stack for stack in reversed(STACKS) if self._targets(f"{module}.{stack}")]
            if len(targeted) != len(depths) or sorted(depths) != list(range(len(depths))):
                raise AdapterError(
                    f"{self.path / WEIGHTS}: {module} has {len(depths)} nested adapters, but target_parameters "
                    f"{self.config.get('target_parameters')} name {len(targeted)} of its stacks; the config is of "
                    "another adapter"
                )
            for depth, stack in enumerate(targeted):
                pairs.append(self._pair(f"{module}.{stack}", depths[depth]))
        return sorted(pairs, key=lambda pair: pair.name)

    @cached_property
    def others(self) -> list[Pair]:
        """Pairs of everything that is no stack of experts."""
        return [
            self._pair(module, keys)
            for module, depths in sorted(self._modules.items())
            if not module.endswith(_EXPERTS_ENDS)
            for keys in depths.values()
        ]

    def rank_of(self, name: str) -> int:
        """Rank of a pair, as PEFT reads ``rank_pattern``."""
        return int(_lookup(self.config.get("rank_pattern") or {}, name, self.rank))

    def scaling_of(self, name: str) -> float:
        """Scale of a pair: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
        alpha = float(_lookup(self.config.get("alpha_pattern") or {}, name, self.alpha))
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _targets(self, name: str) -> bool:
        targets = self.config.get("target_parameters") or []
        return any(name == target or name.endswith(f".{target}") for target in targets)

    def _pair(self, name: str, keys: dict[str, str]) -> Pair:
        if len(keys) != 2:
            (factor,) = keys
            raise AdapterError(f"{self.path / WEIGHTS}: {name} has lora_{factor} without its partner; is it complete?")
        return Pair(name, keys["A"], keys["B"])


_EXPERTS_ENDS = tuple({f".{family.experts}" for family in families.all_families() if family.experts})


def _lookup(patterns: dict[str, Any], name: str, default: float) -> float:
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, default)
