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
    return launched_on_deepspeed(training) or _is_set("ACCELERATE_USE_FSDP") or bool(training.get("fsdp"))


def launched_on_deepspeed(training: Mapping[str, Any]) -> bool:
    """Whether the launcher or the arguments of the trainer ask for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED") or bool(training.get("deepspeed"))


def deepspeed_is_bypassed() -> bool:
    """Whether accelerate was told to use CPUs, for which it starts DDP whatever else it was told."""
    return _is_set("ACCELERATE_USE_CPU")


def launched_in_bf16_by_deepspeed() -> bool:
    """Whether DeepSpeed's configuration says bf16, which it wants to hear from the trainer's arguments too."""
    return launched_on_deepspeed({}) and os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "bf16"


def _is_set(switch: str) -> bool:
    return os.environ.get(switch, "").lower() in ("1", "true", "yes", "on")


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
