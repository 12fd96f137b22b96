"""How the processes of a run were started, from what launchers leave in the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeft.provenance import FollowedRun, RunFolder


def launched_sharded(training: Mapping[str, Any]) -> bool:
    """Whether FSDP or DeepSpeed will shard weights: asked for by the launcher or by arguments of the trainer."""
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    by_launcher = any(os.environ.get(switch, "").lower() == "true" for switch in switches)
    return by_launcher or bool(training.get("fsdp") or training.get("deepspeed"))


def launched_in_bf16_by_deepspeed() -> bool:
    """Whether DeepSpeed's configuration says bf16, which it wants to hear from the trainer's arguments too."""
    return (
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        and os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "bf16"
    )


def num_processes() -> int:
    """Processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the run folder."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Wait until all processes are here."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def shared_run(create: Callable[[], RunFolder], path: Path) -> Iterator[RunFolder]:
    """A run folder that the first process makes and writes, and that the others read, once their group is set up.

    An exception in any process ends that process; launchers then end the others, which would wait for it otherwise.
    """
    if is_main_process():
        with create() as folder:
            wait_for_everyone()
            yield folder
        return
    wait_for_everyone()
    with FollowedRun.open(path) as followed:
        yield followed


@contextmanager
def whole_models() -> Iterator[None]:
    """Load models whole in every process, although ZeRO-3 is configured: it would cut them up while they load.

    It knows no packed weights, and checks of what was loaded need whole ones.
    """
    from transformers.integrations import deepspeed

    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured
