"""How the processes of a run were started, from what launchers leave in the environment. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def launched_sharded(training: Mapping[str, Any]) -> bool:
    """Whether FSDP or DeepSpeed will shard weights: asked for by the launcher or by arguments of the trainer."""
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    by_launcher = any(os.environ.get(switch, "").lower() == "true" for switch in switches)
    return by_launcher or bool(training.get("fsdp") or training.get("deepspeed"))


def num_processes() -> int:
    """Processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the run folder."""
    return int(os.environ.get("RANK", "0")) == 0
