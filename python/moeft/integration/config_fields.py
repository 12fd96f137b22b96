"""Fields of a model's original ``config.json`` that transformers would drop when it saves the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOT_OURS = ("quantization_config", "transformers_version", "_name_or_path")


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
        # Older spellings are properties of the class: setting one would change the field that replaced it.
        if name not in saved and not hasattr(config, name) and name not in NOT_OURS:
            setattr(config, name, value)
