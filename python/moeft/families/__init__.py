"""What differs between model families: names and layouts, read from one TOML file each. No torch here.

The Rust core embeds the same files, so a family is described once.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from moeft.errors import UnsupportedModelError

__all__ = ["COMPONENTS", "Family", "all_families", "for_model_type"]

COMPONENTS = ("experts", "attention", "mlp", "router", "embeddings", "other")
EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: Name of its file.
        model_types: Values of ``model_type`` in ``config.json`` that belong to it.
        layers: Module path of the decoder layers, in memory.
        multimodal_prefix: Prefix of the text model inside a multimodal model; stands for ``model.``.
        text_class: transformers class of the text part alone.
        config: Our name of a config field -> its spellings in this family.
        experts: Path of the experts module below a decoder layer.
        linears: Component (``attention``, ``mlp``, ``router``) -> paths of its linear layers below a decoder layer.
        disk: How the experts lie on disk: the table ``[disk]`` of its file.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    multimodal_prefix: str | None
    text_class: str | None
    config: dict[str, tuple[str, ...]]
    experts: str
    linears: dict[str, tuple[str, ...]]
    disk: dict[str, Any]

    @functools.cached_property
    def _layer(self) -> re.Pattern[str]:
        roots = [self.layers]
        if self.multimodal_prefix is not None:
            roots.append(self.multimodal_prefix + self.layers.removeprefix("model."))
        return re.compile(rf"(?:{'|'.join(map(re.escape, roots))})\.\d+\.(.+)")

    def below_layer(self, name: str) -> str | None:
        """Path of a module or parameter below its decoder layer; None if it is not in one."""
        match = self._layer.fullmatch(name)
        return match[1] if match else None

    def component(self, name: str) -> str:
        """Component of a module or parameter, one of :data:`COMPONENTS`."""
        below = self.below_layer(name)
        if below is None:
            return "embeddings" if any(part in EMBEDDINGS for part in name.split(".")) else "other"
        if below == self.experts or below.startswith(self.experts + "."):
            return "experts"
        for component, paths in self.linears.items():
            if any(below == path or below.startswith(path + ".") for path in paths):
                return component
        return "other"


def for_model_type(model_type: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        UnsupportedModelError: If no family has it; the message names the known ones.
    """
    by_type = {t: family for family in all_families() for t in family.model_types}
    if model_type in by_type:
        return by_type[model_type]
    near = difflib.get_close_matches(model_type, by_type, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnsupportedModelError(
        f"model_type {model_type!r} is not a known family, expected one of {', '.join(sorted(by_type))}{hint}"
    )


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Every family, sorted by name."""
    files = (f for f in resources.files(__name__).iterdir() if f.name.endswith(".toml"))
    return tuple(
        _parse(f.name.removesuffix(".toml"), tomllib.loads(f.read_text("utf-8")))
        for f in sorted(files, key=lambda f: f.name)
    )


def _parse(name: str, table: dict[str, Any]) -> Family:
    modules = table["modules"]
    return Family(
        name=name,
        model_types=tuple(table["model_types"]),
        layers=table["layers"],
        multimodal_prefix=table.get("multimodal_prefix"),
        text_class=table.get("text_class"),
        config={field: tuple(spellings) for field, spellings in table["config"].items()},
        experts=modules["experts"],
        linears={component: tuple(modules[component]) for component in ("attention", "mlp", "router")},
        disk=table.get("disk", {}),
    )
