"""What is to be planned for: a folder, a config.json, or a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeft import families
from moeft.config.sft import Quantization
from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.families import Family
from moeft.planning.headers import weights_from_headers
from moeft.planning.shapes import weights_from_config
from moeft.planning.weights import Weight

PACKED = "moeft_nf4"


@dataclass(frozen=True)
class Model:
    """A model that was not loaded.

    Attributes:
        name: For messages.
        config: Config of its text part.
        family: Its family; None if no family file knows its ``model_type``.
        weights: Every weight, towers of other modalities included.
        source: Where the shapes come from: "headers" or "config".
        packing: How it is packed on disk; None for a 16- or 32-bit checkpoint.
        notes: What the reader must know.
    """

    name: str
    config: Mapping[str, Any]
    family: Family | None
    weights: tuple[Weight, ...]
    source: str
    packing: Quantization | None = None
    notes: tuple[str, ...] = field(default=())


def read_model(source: Any) -> Model:
    """Read a folder (config and headers), a ``config.json``, a mapping, or a config object of transformers.

    Raises:
        FileNotFoundError: If there is no such file, or no ``config.json`` in the folder.
        CheckpointError: If the config is not JSON, lacks a field, or the headers are damaged.
        UnsupportedModelError: If the family is unknown and there are no headers to read.
    """
    if hasattr(source, "to_dict"):
        source = source.to_dict()
    if isinstance(source, Mapping):
        return _model("config", source, None)
    path = Path(source)
    folder, file = (path, path / "config.json") if path.is_dir() else (None, path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the folder of a checkpoint, or its config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, expected the object that is a model's config")
    has_weights = folder is not None and next(folder.glob("*.safetensors"), None) is not None
    return _model(path.name, config, folder if has_weights else None)


def _model(name: str, whole: Mapping[str, Any], folder: Path | None) -> Model:
    config: dict[str, Any] = dict(whole.get("text_config") or whole)
    # Multimodal configs keep this one outside their text part.
    config.setdefault("tie_word_embeddings", whole.get("tie_word_embeddings"))
    model_type = str(whole.get("model_type") or config.get("model_type"))
    notes: list[str] = []
    try:
        family: Family | None = families.for_model_type(model_type)
    except UnsupportedModelError:
        if folder is None:
            raise
        family = None
        notes.append(
            f"model_type {model_type!r} is not a known family: components are guessed from tensor names, and adapters, "
            "activations and speed are left out"
        )
    packing = _packing(whole.get("quantization_config"))
    if folder is not None:
        weights = weights_from_headers(folder, family, config)
        return Model(name, config, family, tuple(weights), "headers", packing, tuple(notes))
    assert family is not None
    if "vision_config" in whole or "audio_config" in whole:
        notes.append("sizes of vision and audio towers are read from headers only; they are not in this table")
    return Model(name, config, family, tuple(weights_from_config(family, config)), "config", packing, tuple(notes))


def _packing(found: Mapping[str, Any] | None) -> Quantization | None:
    if found is None:
        return None
    if found.get("quant_method") != PACKED:
        raise CheckpointError(
            f"the checkpoint is quantised by {found.get('quant_method')!r}; plan for the 16-bit checkpoint, or for one "
            "that `moeft quantize` packed"
        )
    return Quantization(**{key: found[key] for key in Quantization.model_fields if key in found})
