"""Files of ``moeft subspace`` and ``moeft fisher``, checked against what they are used for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeft.config.protection import LAYER_IMPORTANCE_FORMAT, SUBSPACE_FORMAT
from moeft.errors import CheckpointError


class SubspaceFile:
    """A file of ``moeft subspace``.

    Attributes:
        base_fingerprint: Fingerprint of the instruct model.
        rank: Directions of every matrix.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; make it with `moeft subspace`") from error
        metadata = self._file.metadata() or {}
        if metadata.get("format") != SUBSPACE_FORMAT:
            raise CheckpointError(
                f"{path} has format {metadata.get('format')!r}, expected {SUBSPACE_FORMAT!r}; give a file of "
                "`moeft subspace`"
            )
        self.base_fingerprint: str = metadata["base_fingerprint"]
        self.rank = int(metadata["rank"])
        self._names = set(self._file.keys())

    def shape(self, weight: str) -> tuple[int, ...]:
        """Shape of a weight ``[out, in]``, or of a stack ``[E, out, in]``.

        Raises:
            CheckpointError: If the file lacks it.
        """
        for part in ("U", "V"):
            if f"{weight}.{part}" not in self._names:
                raise CheckpointError(
                    f"{self.path} lacks {weight}.{part}, and {weight} is trained; make the file with its target and "
                    "layer, or do not train it"
                )
        *stack, outputs, _ = self._file.get_slice(f"{weight}.U").get_shape()
        return (*stack, outputs, self._file.get_slice(f"{weight}.V").get_shape()[-2])

    def basis(self, weight: str, part: str, rank: int) -> Tensor:
        """First ``rank`` columns of U (outputs) or V (inputs) of a weight, float32."""
        return self._file.get_slice(f"{weight}.{part}")[..., :rank].contiguous()


def normalised_layer_importance(path: Path) -> dict[int, float]:
    """Decoder layer -> importance from 0, the least important layer, to 1; all 1 if no layer stands out.

    Raises:
        CheckpointError: If the file is missing or no ``layer_importance.json`` of ``moeft fisher``.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != LAYER_IMPORTANCE_FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {LAYER_IMPORTANCE_FORMAT!r}")
        layers = {int(layer): float(mean) for layer, mean in content["layers"].items()}
        if unusable := [layer for layer, mean in layers.items() if not math.isfinite(mean)]:
            raise ValueError(f"layer {unusable[0]} has {layers[unusable[0]]}")
        least, most = min(layers.values()), max(layers.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no layer importance: {error}; make it with `moeft fisher`") from error
    return {layer: (mean - least) / (most - least) if most > least else 1.0 for layer, mean in layers.items()}
