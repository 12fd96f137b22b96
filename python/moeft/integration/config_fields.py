"""Fields of a model's original ``config.json`` that transformers would drop when it saves the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep_original(config: Any) -> None:
    """Put fields of the checkpoint's own ``config.json`` back that its config class consumed on loading.

    transformers rewrites, for one, Gemma 4's ``global_head_dim`` into ``per_layer_config``; converters that read the
    old field then fail. A field is put back only if the class has no attribute of that name and saving would lose it.
    """
    file = Path(config._name_or_path) / "config.json"
    if not file.is_file():
        return
    saved, original = config.to_dict(), json.loads(file.read_text("utf-8"))
    if original.get("model_type") != saved.get("model_type"):
        return  # the text part of a multimodal checkpoint: its fields lie deeper, and the others are not its own
    for name, value in original.items():
        if name not in saved and name not in ("quantization_config", "transformers_version", "_name_or_path"):
            setattr(config, name, value)
