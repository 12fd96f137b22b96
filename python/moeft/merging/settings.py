"""What a merge recipe says of one tensor, read once more to check the engine's reading.

The words are those of ``docs/merging.md``. The engine has parsed the recipe before, so nothing is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.config import document

_LAYER = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """Decoder layer of a tensor; None outside of the layers."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def setting_at(setting: Any, name: str, depth: float) -> Any:
    """A parameter for the tensor ``name`` at ``depth``, 0 in the first layer to 1 in the last; None if nothing fits."""
    if not isinstance(setting, list):
        return setting
    if all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            filter_ = entry.get("filter")
            if filter_ in (None, "*") or re.search(filter_, name):
                return setting_at(entry["value"], name, depth)
        return None
    place = depth * (len(setting) - 1)
    left = int(place)
    right = min(left + 1, len(setting) - 1)
    return setting[left] + (setting[right] - setting[left]) * (place - left)


@dataclass(frozen=True)
class Recipe:
    """A merge recipe as its file says it.

    Args:
        content: Its keys.
        folder: Where relative paths start.
        num_layers: Decoder layers of the base.
    """

    content: Mapping[str, Any]
    folder: Path
    num_layers: int

    @staticmethod
    def read(path: Path) -> tuple[dict[str, Any], Path]:
        """Keys of a file, and the folder of its relative paths."""
        return document.read(path), path.absolute().parent

    @property
    def method(self) -> str:
        """``merge_method``."""
        return str(self.content["merge_method"])

    @property
    def base(self) -> Path:
        """The base, or the first whole model, whose names and layout the output has."""
        first = next((entry["model"] for entry in self.content["models"] if "model" in entry), None)
        return self.path(self.content.get("base_model", first))

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """What is merged. Where the base is part of the formula it is no model beside it."""
        entries = self.content["models"]
        if self.method in ("linear", "passthrough"):
            return list(entries)
        return [entry for entry in entries if "model" not in entry or self.path(entry["model"]) != self.base]

    def path(self, value: Any) -> Path:
        """A path of the recipe."""
        return self.folder / str(value)

    def value(self, key: str, name: str, default: Any, own: Mapping[str, Any] | None = None) -> Any:
        """A parameter for a tensor: that of a model if it has one, else that of the recipe, else the default."""
        layer = layer_of(name)
        depth = 0.0 if layer is None or self.num_layers < 2 else layer / (self.num_layers - 1)
        keys = ("scale", "lambda") if key == "scale" else (key,)
        places: Iterable[Mapping[str, Any]] = (
            (own or {}).get("parameters") or {},
            self.content.get("parameters") or {},
        )
        for place in places:
            for word in keys:
                if word in place:
                    found = setting_at(place[word], name, depth)
                    return default if found is None else found
        return default
