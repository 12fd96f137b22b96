"""What llama.cpp calls the tensors of each architecture: one TOML file each, read here."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from moeft.errors import UnsupportedModelError
from moeft.families import Family

__all__ = ["Architecture", "architecture_of"]


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        name: ``general.architecture``.
        family: Name of our family.
        tokenizer: ``model`` and, for byte-level BPE, ``pre`` of llama.cpp's tokenizer; ``add_bos``.
        tensors: Name in memory -> name in the file, outside of layers.
        layer: The same below a decoder layer, without ``blk.N.``.
        experts: ``gate_up``, or ``gate`` and ``up``, and ``down`` -> name in the file; empty in a dense architecture.
        norm_offset: Added to every norm.
        interleaved: Weights below a layer whose heads have their two halves interleaved.
    """

    name: str
    family: str
    tokenizer: dict[str, Any]
    tensors: dict[str, str]
    layer: dict[str, str]
    experts: dict[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    interleaved: tuple[str, ...] = ()


def architecture_of(family: Family) -> Architecture:
    """The architecture of a family.

    Raises:
        UnsupportedModelError: If moeft cannot write this family as GGUF.
    """
    known = _all()
    if family.name not in known:
        raise UnsupportedModelError(
            f"moeft cannot write {family.name} as GGUF, expected one of {', '.join(sorted(known))}; "
            "convert this model with llama.cpp's convert_hf_to_gguf.py"
        )
    return known[family.name]


@functools.cache
def _all() -> dict[str, Architecture]:
    files = (file for file in resources.files(__name__).iterdir() if file.name.endswith(".toml"))
    tables = (tomllib.loads(file.read_text("utf-8")) for file in files)
    found = (Architecture(**{**table, "interleaved": tuple(table.get("interleaved", ()))}) for table in tables)
    return {architecture.family: architecture for architecture in found}
