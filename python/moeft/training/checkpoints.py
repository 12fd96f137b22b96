"""Checkpoints that a Trainer left in a folder."""

from __future__ import annotations

import json
from pathlib import Path


def last_checkpoint(folder: Path) -> Path | None:
    """Latest checkpoint of a Trainer that was written to its end; None if there is none.

    A kill in the middle of a save leaves a folder without a whole ``trainer_state.json``, which Trainer writes last.
    Trainer would load its weights and count the steps from zero again.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step in sorted(steps, reverse=True):
        try:
            state = json.loads((steps[step] / "trainer_state.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        if state["global_step"] == step:
            return steps[step]
    return None
