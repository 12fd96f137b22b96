"""The fields of a checkpoint's ``config.json`` that a GGUF file needs, in whichever spelling they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft.errors import CheckpointError

_REQUIRED = object()


class TextConfig:
    """The text part of a ``config.json``.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: If there is no such file, it is not a JSON object, or the weights are packed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        self.whole = read_json(self.path)
        packed = self.whole.get("quantization_config")
        if packed:
            method = packed.get("quant_method") if isinstance(packed, dict) else packed
            raise CheckpointError(
                f"{folder} is packed (quant_method {method!r}), expected a 16- or 32-bit checkpoint; "
                "export the one that it was made from"
            )
        text = self.whole.get("text_config")
        self.fields: Mapping[str, Any] = {**self.whole, **text} if isinstance(text, dict) else self.whole

    @property
    def model_type(self) -> str:
        """``model_type`` of the whole file."""
        return str(self.whole.get("model_type") or self.get("model_type"))

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of these fields that is there and not null.

        Raises:
            CheckpointError: If none is and there is no default.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        if default is _REQUIRED:
            raise CheckpointError(f"{self.path} has no {names[0]}, which a GGUF file of this model needs")
        return default

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return int(self.get("head_dim", default=0) or self.get("hidden_size") // self.get("num_attention_heads"))

    def rope(self, layer_type: str = "full_attention") -> Mapping[str, Any]:
        """Rotary parameters of a kind of layer, in the spelling of transformers 5."""
        parameters = self.get("rope_parameters", default={})
        if isinstance(parameters.get(layer_type), dict):
            return dict(parameters[layer_type])
        if "rope_theta" in parameters:
            return dict(parameters)
        older = "rope_local_base_freq" if layer_type == "sliding_attention" else "rope_theta"
        scaling = dict(self.get("rope_scaling", default={}) or {}) if layer_type == "full_attention" else {}
        scaling.setdefault("rope_type", scaling.get("type", "default"))
        return {**scaling, "rope_theta": self.get(older, "rope_theta", default=10000.0)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: If the file is missing or holds none.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; a checkpoint needs it to become a GGUF file") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, expected a JSON object")
    return found
